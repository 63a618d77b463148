"""Scoring: from tasks to predictions in Label Studio. Every step looks before it writes, as a job may run twice."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime

from anomaly_workers import images, push
from anomaly_workers.counters import count
from anomaly_workers.detectors.regions import regions
from anomaly_workers.errors import ImageError
from anomaly_workers.labelstudio import config, encode
from anomaly_workers.runtime import Runtime, Session
from anomaly_workers.store import image_key
from anomaly_workers.types import JSON, Detection, Picture, Progress, Task

logger = logging.getLogger(__name__)

FETCHERS = 4
"""Images fetched and decoded at once; the network hides behind the GPU or the other CPU core."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One task through the detector."""

    task: Task
    picture: Picture
    detection: Detection


def score(
    runtime: Runtime, progress: Progress, *, project: int, version: str, tasks: list[JSON]
) -> dict[str, int | str]:
    """Score tasks with a version, keep the results, push them to Label Studio.

    A broken image is noted as its task's failure; the rest of the batch goes on.
    """
    started = time.monotonic()
    session = runtime.session(project)
    if version not in (session.store.current, session.store.rollout):
        return {"skipped": f"{version} is no longer wanted"}
    wanted = [Task(id=int(task["id"]), data=task["data"]) for task in tasks]
    stored = {task.id: record for task in wanted if (record := _stored(session, version, task)) is not None}
    missing = [task for task in wanted if task.id not in stored]
    before = {task.id for task in missing if session.store.record(version, task.id) is not None}
    renamed = {task.id: record for task in missing if (record := re_encoded(session, version, task)) is not None}
    scored = detect(runtime, session, version, [task for task in missing if task.id not in renamed], progress)
    predictions = [keep(session, version, item) for item in scored] + list(stored.values())
    progress(0.8, "pushing")
    fresh, others = [item for item in predictions if item["task"] not in before], _bare(renamed.values())
    others += [item for item in predictions if item["task"] in before]
    session.store.forget_failures([item.task.id for item in scored])  # before Label Studio may refuse some
    pushed = push.predictions(runtime.redis, session.client, session.store, version, fresh)
    replaced = push.replacements(runtime.redis, session.client, session.store, version, others)
    for task in renamed.keys() & set(replaced):  # last: whoever is killed before does it again
        session.store.derive_record(version, task, renamed[task])
    predictions += renamed.values()
    pushed += len(replaced)
    count(runtime.redis, "images_scored", len(scored))
    count(runtime.redis, "predictions_pushed", pushed)
    count(runtime.redis, "scoring_seconds", time.monotonic() - started)
    return {"scored": len(predictions), "pushed": pushed, "failed": len(wanted) - len(predictions)}


def detect(runtime: Runtime, session: Session, version: str, tasks: Sequence[Task], progress: Progress) -> list[Scored]:
    """Run the detector over the tasks whose image can be read."""
    if not tasks:
        return []
    detector = runtime.detector(session.store.id, version)
    pictures = gather(runtime, session, tasks, side=detector.side, progress=part(progress, 0.0, 0.5))
    progress(0.5, "scoring")
    known = [(task, picture) for task, picture in zip(tasks, pictures, strict=True) if picture is not None]
    detections = detector.predict([picture for _, picture in known]) if known else []
    return [Scored(*pair, detection) for pair, detection in zip(known, detections, strict=True)]


def gather(
    runtime: Runtime, session: Session, tasks: Sequence[Task], *, side: int, progress: Progress
) -> list[Picture | None]:
    """Fetch and decode the tasks' images; None, and a noted failure, for each that is broken."""
    done = 0
    pictures: list[Picture | None] = []
    with ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch") as pool:
        try:
            for picture in pool.map(lambda task: _picture(runtime, session, task, side), tasks):
                pictures.append(picture)
                done += 1
                progress(done / len(tasks), "fetching images")
        finally:
            pool.shutdown(cancel_futures=True)
    count(runtime.redis, "images_failed", pictures.count(None))
    return pictures


def keep(session: Session, version: str, item: Scored) -> JSON:
    """Store one result with its map and heatmap; return the prediction to push."""
    detection = item.detection
    prediction = encode.prediction(item.task.id, detection, regions(detection), session.controls, version)
    value = config.image_of(item.task.data, session.controls.value) or ""
    drawn = images.heatmap(item.picture, detection.anomaly_map, detection.threshold)
    session.store.keep_heatmap(version, value, drawn)
    extra = {
        "anomaly_score": detection.score,
        "threshold": detection.threshold,
        "size": list(detection.size),
        "image": image_key(value),
        "controls": repr(session.controls),
        "calmed": len(session.store.calmed(version)),
        "parts": [round(part, 6) for part in detection.parts],
        "first_at": _first_at(session, version, item.task),
    }
    record = prediction | {"anomaly": extra}
    session.store.keep_record(version, item.task.id, record, detection.anomaly_map, hottest=detection.hottest)
    return prediction


def _first_at(session: Session, version: str, task: Task) -> str:
    """When a version first scored a task: records are written again for other reasons than a new image."""
    before = session.store.record(version, task.id) or {}
    known = before.get("anomaly", {}).get("first_at")
    return str(known) if known else datetime.now(UTC).isoformat(timespec="seconds")


def re_encoded(session: Session, version: str, task: Task) -> JSON | None:
    """Return the record of a task in the names of a label config that changed since.

    The map is stored, so the network need not look again. None where that is not enough: another image since, or a
    record of an earlier release that does not say how large the image is.
    """
    record = session.store.record(version, task.id)
    if record is None:
        return None
    about = record["anomaly"]
    anomaly_map, size = session.store.anomaly_map(version, task.id), about.get("size")
    if anomaly_map is None or not size or not _is_same_image(session, task, about):
        return None
    detection = Detection(about["anomaly_score"], about["threshold"], anomaly_map, (int(size[0]), int(size[1])))
    prediction = encode.prediction(task.id, detection, regions(detection), session.controls, version)
    return prediction | {"anomaly": about | {"controls": repr(session.controls)}}


def _bare(records: Iterable[JSON]) -> list[JSON]:
    """Return records as Label Studio takes them."""
    return [{name: value for name, value in record.items() if name != "anomaly"} for record in records]


def _is_same_image(session: Session, task: Task, about: JSON) -> bool:
    return bool(about["image"] == image_key(config.image_of(task.data, session.controls.value) or ""))


def _stored(session: Session, version: str, task: Task) -> JSON | None:
    """Return what this version said of the same image for the same label config, so that a rollback is exact."""
    record = session.store.record(version, task.id)
    if record is None:
        return None
    about = record.pop("anomaly")
    same_controls = about["controls"] == repr(session.controls)
    return record if same_controls and _is_same_image(session, task, about) else None


def _picture(runtime: Runtime, session: Session, task: Task, side: int) -> Picture | None:
    value = config.image_of(task.data, session.controls.value) or ""
    if (kept := session.pictures.get(value, side=side)) is not None:
        return kept
    fetched = False
    try:
        content = session.fetcher.fetch(value, task_id=task.id)
        fetched = True
        picture = images.load(content, side=side, max_megapixels=runtime.settings.max_megapixels)
        session.pictures.put(value, picture, side=side)
        return picture
    except ImageError as error:
        # What arrived and cannot be decoded stays broken; what did not arrive may arrive later.
        session.store.keep_failure(task.id, str(error), value, permanent=fetched)
        logger.warning("project %d, task %d: %s", session.store.id, task.id, error)
        return None


def part(progress: Progress, start: float, end: float, stage: str = "") -> Progress:
    """Map a step's own progress onto its part of the job's."""
    return lambda fraction, name: progress(start + (end - start) * fraction, stage or name)
