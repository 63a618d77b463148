"""Images go in, predictions come out: a real Label Studio, a real worker, nothing in between is replaced."""

from __future__ import annotations

import io
import struct
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image
from product import Product, encoded, wait_for, washers

from anomaly_workers import sweep
from anomaly_workers.enrol import heatmap_address
from anomaly_workers.labelstudio import config
from anomaly_workers.push import writing
from anomaly_workers.store import ProjectStore


@pytest.fixture(scope="module")
def scored(product: Product) -> ProjectStore:
    store = product.project("scored")
    product.add_washers(store)
    product.add(store, washers(2, defect="stain", seed=5))
    product.scored(store)
    return store


def test_every_open_task_has_exactly_one_prediction_of_the_deployed_version(
    product: Product, scored: ProjectStore
) -> None:
    assert set(map(tuple, product.versions(scored).values())) == {(scored.current,)}
    wait_for(lambda: product.client.project(scored.id).model_version == scored.current, "the literal version")


def test_a_defect_gets_the_verdict_the_mask_and_the_number(product: Product, scored: ProjectStore) -> None:
    (defect,) = product.add(scored, washers(1, defect="stain", seed=77))
    product.scored(scored)
    (prediction,) = product.client.predictions(scored.id, tasks=[defect])[defect]
    controls = config.parse(scored.label_config)
    by_type = {region["type"]: region for region in prediction["result"]}
    assert by_type["choices"]["value"]["choices"] == [controls.anomaly]
    assert by_type["brushlabels"]["value"]["rle"]
    assert 0.5 < by_type["number"]["value"]["number"] <= 1
    assert 0 <= prediction["score"] <= 1


def test_a_scored_image_has_a_heatmap_and_a_stranger_does_not(product: Product, scored: ProjectStore) -> None:
    task = next(iter(product.client.open_tasks(scored.id)))
    address = heatmap_address(product.settings, scored.id)
    answer = httpx.get(f"{address}?src={task.data['image']}")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["cache-control"] == "no-cache", "not the picture that says it is pending"
    assert Image.open(io.BytesIO(answer.content)).size[0] >= 128
    assert httpx.get(address[:-1] + "0?src=/x").status_code in (200, 404)
    assert httpx.get(address[:-8] + "deadbeef?src=/x").status_code == 404


def test_a_new_version_replaces_the_old_one_and_rolls_back_exactly(product: Product, scored: ProjectStore) -> None:
    product.scored(scored)
    first = scored.current
    before = product.client.predictions(scored.id)
    product.queues().enqueue_fit(scored.id, "training")
    wait_for(lambda: scored.current != first and not scored.rollout, "the next version")
    wait_for(lambda: first not in product.client.versions(scored.id), "the old predictions to go")
    assert set(map(tuple, product.versions(scored).values())) == {(scored.current,)}

    scored.roll_out(first)
    wait_for(lambda: scored.current == first and not scored.rollout, "the first version again")
    wait_for(lambda: list(product.client.versions(scored.id)) == [first], "its predictions alone")
    after = product.client.predictions(scored.id)
    assert {task: one[0]["result"] for task, one in after.items()} == {
        task: one[0]["result"] for task, one in before.items()
    }


def test_doubled_predictions_are_mended(product: Product, scored: ProjectStore) -> None:
    product.scored(scored)
    wait_for(lambda: not scored.rollout, "no rollout")
    queue = product.queues()
    with writing(queue.connection, scored.id):
        twice = [one[0] for one in product.client.predictions(scored.id).values()][:3]
        product.client.import_predictions(
            scored.id, [{name: one[name] for name in ("task", "result", "score", "model_version")} for one in twice]
        )
    with_double = product.client.prediction_counts(scored.id, scored.current)
    assert max(with_double.values()) == 2
    sweep.sweep_project(product.client, scored, queue, product.settings)
    assert set(product.client.prediction_counts(scored.id, scored.current).values()) == {1}


def test_broken_images_are_reported_and_the_good_ones_scored(product: Product) -> None:
    store = product.project("broken images")
    good = washers(6, seed=3)
    pixels = np.asarray(Image.open(io.BytesIO(good[0][1])))
    grey = pixels[..., 0].astype(np.uint16) * 256
    fine = [
        ("sixteen-bit.png", encoded(Image.fromarray(grey), "PNG")),
        ("cmyk.jpg", encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG")),
    ]
    broken = [
        ("truncated.jpg", good[1][1][: len(good[1][1]) // 2]),
        ("text.png", b"this is not a picture\n" * 20),
        ("bomb.png", _bomb(60_000, 60_000)),
    ]
    product.add(store, good)
    product.add(store, fine)
    (pixel,) = product.add(store, [("pixel.png", encoded(Image.new("RGB", (1, 1)), "PNG"))])
    bad = product.add(store, broken)
    versions = product.scored(store, but=[*bad, pixel])
    wait_for(lambda: store.failing() >= set(bad), "a reason for each broken image")
    reasons = {failure.task: failure.reason for failure in store.failures()}
    assert all(reasons[task] and "\n" not in reasons[task] for task in bad)
    assert {task for task, found in versions.items() if found != [store.current]} <= {*bad, pixel}
    assert pixel in reasons or versions[pixel] == [store.current], "a 1 px image is scored or explained"
    print("\n".join(f"{name}: {reasons[task]}" for (name, _), task in zip(broken, bad, strict=True)))


def _bomb(width: int, height: int) -> bytes:
    """A PNG of some kilobytes that would decode to gigabytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1_000_000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
