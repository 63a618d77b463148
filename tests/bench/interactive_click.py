"""What a click or a box with Auto-annotation on is worth: IoU with the ground truth beside thresholding the map.

    python tests/bench/interactive_click.py [--pool] DIR…

Each class with masks is fitted on train/good; twenty of its test/ defects (pool/ with --pool, where the method was
chosen) are drawn by a fixed seed and stored as a worker stores them. One click goes to the innermost point of the
largest defect region, one box is that region's with a quarter of its size added on every side. Both are asked of the
front end's /predict as Label Studio asks. "threshold" is the map's component at the click at or above the operating
point (for the box: at its hottest pixel, inside it), "best level" the best any level of the map could do there.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from flask.testing import FlaskClient
from numpy.typing import NDArray
from PIL import Image

from anomaly_backend.app import create_app
from anomaly_backend.dispatch import Dispatcher
from anomaly_workers import detectors, evaluate, queues, server
from anomaly_workers.labelstudio import masks
from anomaly_workers.pictures import PictureCache
from anomaly_workers.queues import Queues
from anomaly_workers.settings import load_settings
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.types import JSON, Connection, Detection, Picture

DEFECTS, SEED, LOOSE = 20, 0, 0.25
CONFIG = (
    '<View><Image name="image" value="$image"/><BrushLabels name="mask" toName="image"><Label value="Defect"/>'
    "</BrushLabels></View>"
)
Mask = NDArray[np.bool_]
Times = list[tuple[float, float]]


@dataclass(frozen=True)
class Defect:
    """A stored task with what is true of it."""

    task: int
    detection: Detection
    truth: Mask

    @property
    def data(self) -> JSON:
        return {"image": f"/data/upload/1/{self.task}.png"}


def main(folders: list[Path], *, pool: bool) -> None:
    """Print a line for each class and the times of all requests."""
    seconds: Times = []
    columns = ("threshold", "answer", "best level", "box: threshold", "box: answer")
    print("class          " + "".join(f"{name:>16}" for name in columns) + "   (median IoU)")
    with tempfile.TemporaryDirectory() as folder:
        settings = load_settings({}, data_dir=Path(folder), password="pass")
        queue = Queues(queues.connect(server.ensure(settings)), settings)
        dispatcher = Dispatcher(Store(Path(folder)), queue, settings)
        client = create_app(settings, dispatcher).test_client()
        try:
            for number, one in enumerate(evaluate.class_folders(folders), start=1):
                store = dispatcher.store.project(number)
                found: dict[str, list[float]] = defaultdict(list)
                for defect in stored(store, one, pool=pool):
                    for name, value in measured(client, store, defect, seconds).items():
                        found[name].append(value)
                line = "".join(f"{np.median(found[name]):16.3f}" for name in columns)
                print(f"{one.name:15}{line}   {len(found['answer'])} defects", flush=True)
        finally:
            queue.connection.close()
            server.stop(settings)
    for name, times in zip(("wall", "CPU"), 1000 * np.array(seconds[1:]).T, strict=True):
        middle, late, last = np.quantile(times, (0.5, 0.95, 1))
        print(f"{len(times)} warm requests, {name} time: p50 {middle:.0f} ms, p95 {late:.0f} ms, slowest {last:.0f} ms")


def stored(store: ProjectStore, folder: Path, *, pool: bool) -> list[Defect]:
    """Fit the class and store twenty defects as a worker would."""
    one = evaluate.read_class(folder)
    detector = detectors.create(detectors.Options())
    train = [picture for batch in evaluate.decoded(one.train, detector.side) for picture in batch]
    detector.fit(train, confirmed=[True] * len(train))
    candidates = one.pool if pool else [path for path, label in zip(one.test, one.labels, strict=True) if label]
    known = [path for path in candidates if evaluate.mask_file(folder, path)]
    chosen = np.random.default_rng(SEED).permutation(len(known))[:DEFECTS]
    files = [known[index] for index in sorted(chosen)]
    store.connect(Connection(url="http://label-studio", project=store.id, token="secret"))
    store.keep_label_config(CONFIG)
    with store.new_version() as scratch:
        (scratch / "detector.safetensors").write_bytes(b"not needed")
        version = store.publish(scratch, {"detector": "patchcore-padim", "image_size": detector.side})
    store.roll_out(version)
    pictures = [picture for batch in evaluate.decoded(files, detector.side) for picture in batch]
    return [
        _kept(store, version, detector.side, Defect(task, detection, _truth(folder, file)), picture)
        for task, (file, picture, detection) in enumerate(
            zip(files, pictures, detector.predict(pictures), strict=True), start=1
        )
    ]


def _kept(store: ProjectStore, version: str, side: int, defect: Defect, picture: Picture) -> Defect:
    record = {"task": defect.task, "model_version": version, "score": 0.0, "result": []}
    store.keep_record(version, defect.task, record, defect.detection.anomaly_map)
    PictureCache(store.folder / "pictures", limit=10**9).put(defect.data["image"], picture, side=side)
    return defect


def measured(client: FlaskClient, store: ProjectStore, defect: Defect, seconds: Times) -> dict[str, float]:
    """Return the IoUs of one click and one box."""
    truth, (x, y), (left, top, right, bottom) = _target(defect.truth)
    anomaly_map, threshold = store.anomaly_map(store.current, defect.task), defect.detection.threshold
    assert anomaly_map is not None
    rows, columns = anomaly_map.shape
    place = (min(int(y * rows), rows - 1), min(int(x * columns), columns - 1))
    box = np.zeros((rows, columns), np.bool_)
    box[int(top * rows) : max(1, int(np.ceil(bottom * rows))), int(left * columns) : int(np.ceil(right * columns))] = 1
    hottest = np.unravel_index(int(np.where(box, anomaly_map, -1).argmax()), box.shape)
    point = {"type": "keypointlabels", "is_positive": True, "value": {"x": 100 * x, "y": 100 * y, "width": 0.3}}
    area = {"x": 100 * left, "y": 100 * top, "width": 100 * (right - left), "height": 100 * (bottom - top)}
    levels = np.linspace(0.2 * anomaly_map[place], anomaly_map[place], 25)
    return {
        "threshold": _iou(_component(anomaly_map >= threshold, place), truth),
        "answer": _iou(asked(client, store, defect, point, seconds), truth),
        "best level": max(_iou(_component(anomaly_map >= level, place), truth) for level in levels),
        "box: threshold": _iou(_component((anomaly_map >= threshold) & box, hottest), truth),
        "box: answer": _iou(
            asked(client, store, defect, {"type": "rectanglelabels", "value": area | {"rotation": 0}}, seconds), truth
        ),
    }


def asked(client: FlaskClient, store: ProjectStore, defect: Defect, hint: JSON, seconds: Times) -> Mask:
    """Return the mask that the front end answers, at the image's own size."""
    height, width = defect.truth.shape
    body = {
        "tasks": [{"id": defect.task, "data": defect.data, "project": store.id}],
        "project": f"{store.id}.1795346383",
        "label_config": CONFIG,
        "params": {"context": {"result": [hint | {"original_width": width, "original_height": height}]}},
    }
    start, worked = time.perf_counter(), time.process_time()
    response = client.post("/predict", json=body, auth=("label-studio", "pass"))
    seconds.append((time.perf_counter() - start, time.process_time() - worked))
    [answer] = response.get_json()["results"]
    [region] = answer["result"]
    return masks.from_rle(region["value"]["rle"], (height, width)) > 127


def _truth(folder: Path, file: Path) -> Mask:
    path = evaluate.mask_file(folder, file)
    assert path is not None
    with Image.open(path) as picture:
        return np.asarray(picture.convert("L")) > 127


def _target(truth: Mask) -> tuple[Mask, tuple[float, float], tuple[float, float, float, float]]:
    """Return the largest region, its innermost point (x, y) and a loose box (left, top, right, bottom) in [0, 1]."""
    _count, labels, stats, _centres = cv2.connectedComponentsWithStats(truth.astype(np.uint8), connectivity=8)
    largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
    region = labels == largest
    depth = cv2.distanceTransform(np.pad(region.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    row, column = np.unravel_index(int(depth.argmax()), depth.shape)
    height, width = truth.shape
    x, y, w, h = (int(value) for value in stats[largest][:4])
    left, right = max(0.0, (x - LOOSE * w) / width), min(1.0, (x + w + LOOSE * w) / width)
    top, bottom = max(0.0, (y - LOOSE * h) / height), min(1.0, (y + h + LOOSE * h) / height)
    return region, ((column + 0.5) / width, (row + 0.5) / height), (left, top, right, bottom)


def _component(mask: Mask, place: tuple[int, ...]) -> Mask:
    if not mask[place]:
        return np.zeros_like(mask)
    _count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    return np.asarray(labels == labels[place])


def _iou(mask: Mask, truth: Mask) -> float:
    full = mask if mask.shape == truth.shape else masks.enlarged(mask, truth.shape)
    union = np.count_nonzero(full | truth)
    return float(np.count_nonzero(full & truth) / union) if union else 0.0


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if name != "--pool"]
    main([Path(name) for name in names], pool="--pool" in sys.argv)
