"""Clicks, boxes and strokes: what belongs to the defect they show."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from anomaly_backend.interactive import Hint, answer, defect_at, hint
from anomaly_workers.labelstudio import config, decode, masks
from anomaly_workers.pictures import PictureCache
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.types import Picture, Task

SHAPE = (128, 160)
CONFIG = (
    '<View><Image name="image" value="$image"/><BrushLabels name="mask" toName="image"><Label value="Defect"/>'
    "</BrushLabels></View>"
)
CONTROLS = config.parse(CONFIG)
TASK = Task(7, {"image": "/data/upload/1/a.png"})


def bumps(*centres: tuple[int, int], width: float = 9.0) -> NDArray[np.float32]:
    """A calibrated map with smooth bumps, as a detector makes of defects smaller than what a patch sees."""
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    raw = np.full(SHAPE, -1.0)
    for row, column in centres:
        raw = np.maximum(raw, -1 + 3 * np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * width**2)))
    return np.asarray(0.5 + 0.5 * raw / (1 + np.abs(raw)), np.float32)


def region(kind: str, x: float, y: float, *, positive: bool = True, **value: Any) -> dict[str, Any]:
    """What Label Studio sends of something drawn, in pixels of SHAPE."""
    place = {"x": 100 * x / SHAPE[1], "y": 100 * y / SHAPE[0]} | value
    size = {"original_height": SHAPE[0], "original_width": SHAPE[1]}
    return {"type": kind, "value": place, "is_positive": positive} | size


def click(row: int, column: int, *, positive: bool = True) -> Hint:
    found = hint(region("keypointlabels", column, row, positive=positive), SHAPE)
    assert found is not None
    return found


def box(top: int, left: int, bottom: int, right: int) -> Hint:
    sides = {"width": 100 * (right - left) / SHAPE[1], "height": 100 * (bottom - top) / SHAPE[0]}
    found = hint(region("rectanglelabels", left, top, **sides), SHAPE)
    assert found is not None
    return found


def test_a_click_takes_its_own_defect_alone() -> None:
    found = defect_at(bumps((40, 40), (90, 120)), [click(42, 41)])
    assert found[40, 40]
    assert not found[90, 120]
    assert found.sum() < 400, "the core of the bump and not its foot"


def test_clicks_on_two_places_take_both() -> None:
    found = defect_at(bumps((40, 40), (90, 120)), [click(40, 40), click(90, 120)])
    assert found[40, 40]
    assert found[90, 120]


def test_a_negative_click_takes_its_side_away() -> None:
    joined = bumps(*((64, column) for column in range(60, 81)), width=12)
    assert defect_at(joined, [click(64, 60)])[64, 80]
    found = defect_at(joined, [click(64, 60), click(64, 80, positive=False)])
    assert found[64, 60]
    assert not found[64, 71:].any()


def test_a_negative_click_in_a_box_takes_its_surroundings_away() -> None:
    found = defect_at(bumps((64, 80), width=20), [box(40, 50, 90, 110), click(64, 90, positive=False)])
    assert found[64, 75]
    assert not found[64, 90]


def test_a_box_says_where_the_defect_ends() -> None:
    found = defect_at(bumps((64, 80), width=30), [box(50, 60, 80, 100)])
    assert found[64, 80]
    outside = np.ones(SHAPE, np.bool_)
    outside[50:80, 60:100] = False
    assert not (found & outside).any()


def test_a_click_inside_a_box_chooses_among_the_defects_there() -> None:
    found = defect_at(bumps((40, 40), (40, 100)), [box(20, 20, 60, 130), click(40, 40)])
    assert found[40, 40]
    assert not found[40, 100]


def test_a_click_where_the_map_sees_nothing_stays_near() -> None:
    flat = np.asarray(0.2 + 0.001 * np.random.default_rng(0).random(SHAPE), np.float32)
    found = defect_at(flat, [click(64, 80)])
    assert found[64, 80]
    rows, columns = np.nonzero(found)
    assert np.hypot(rows - 64, columns - 80).max() <= 0.19 * np.sqrt(flat.size)


def test_the_picture_says_where_the_map_is_vague() -> None:
    picture = np.full((*SHAPE, 3), 200, np.uint8)
    picture += np.random.default_rng(0).integers(0, 12, picture.shape, dtype=np.uint8)
    picture[58:72, 70:92] = (60, 50, 40)
    truth = np.zeros(SHAPE, np.bool_)
    truth[58:72, 70:92] = True

    def overlap(found: NDArray[np.bool_]) -> float:
        return float((found & truth).sum() / (found | truth).sum())

    vague = bumps((66, 82), width=14)
    assert overlap(defect_at(vague, [click(65, 81)], picture=picture)) > 0.9
    assert overlap(defect_at(vague, [click(65, 81)], picture=picture)) > overlap(defect_at(vague, [click(65, 81)]))
    assert overlap(defect_at(vague, [box(50, 60, 80, 102)], picture=picture)) > 0.9


def test_a_picture_of_one_colour_changes_nothing() -> None:
    plain = np.full((*SHAPE, 3), 128, np.uint8)
    found = defect_at(bumps((66, 82)), [click(66, 82)], picture=plain)
    assert found[66, 82]
    assert 10 < found.sum() < 1500


def test_a_stroke_belongs_to_the_defect_whole() -> None:
    stroke = np.zeros(SHAPE, np.bool_)
    stroke[60:64, 20:140] = True
    drawn = region("brushlabels", 0, 0) | {"value": {"format": "rle", "rle": masks.to_rle(stroke, SHAPE)}}
    found = hint(drawn, SHAPE)
    assert found is not None
    assert defect_at(bumps((64, 80)), [found])[stroke].all()


def test_a_stroke_of_a_far_larger_image_is_no_hint() -> None:
    drawn = region("brushlabels", 0, 0) | {"value": {"rle": masks.to_rle(np.ones(SHAPE, np.bool_), SHAPE)}}
    assert hint(drawn, SHAPE, size=SHAPE) is not None
    assert hint(drawn, SHAPE, size=(SHAPE[0] // 4, SHAPE[1] // 2)) is None


def test_a_polygon_encloses() -> None:
    drawn = region("polygonlabels", 0, 0) | {"value": {"points": [[10, 10], [60, 10], [60, 60], [10, 60]]}}
    found = hint(drawn, SHAPE)
    assert found is not None
    assert found.encloses


@pytest.mark.parametrize(
    "drawn",
    [
        {},
        {"type": "choices", "value": {"choices": ["a"]}},
        {"type": "keypointlabels", "value": {"x": "far", "y": 3}},
        {"type": "brushlabels", "value": {"rle": [1, 2, 3]}, "original_width": 9, "original_height": 9},
        {"type": "polygonlabels", "value": {"points": [[1e9, 2], [3, 4], [5, 6]]}},
        {"type": "rectanglelabels", "value": None},
    ],
)
def test_what_has_no_place_is_no_hint(drawn: dict[str, Any]) -> None:
    assert hint(drawn, SHAPE) is None


@pytest.mark.parametrize(("x", "y"), [(0, 0), (100, 100), (-5, 50), (120, 50)])
def test_hints_at_and_beyond_the_border_are_inside(x: float, y: float) -> None:
    for kind in ("keypointlabels", "rectanglelabels"):
        found = hint({"type": kind, "value": {"x": x, "y": y, "width": 1, "height": 1}}, SHAPE)
        assert found is not None
        assert found.mask.any()
        assert defect_at(bumps((64, 80)), [found]).any()


def test_a_turned_box_is_read_as_in_an_annotation() -> None:
    drawn = region("rectanglelabels", 80, 20, width=40.0, height=10.0, rotation=45)
    found = hint(drawn, SHAPE, size=SHAPE)
    assert found is not None
    assert found.encloses
    assert (found.mask == decode.judgement([drawn | {"to_name": "image"}], CONTROLS, SHAPE).mask).all()
    assert not found.mask[22, 130], "where it would be if it were not turned"


def stored(folder: Path, *, picture: bool = False, **about: Any) -> ProjectStore:
    store = Store(folder).project(1)
    store.keep_label_config(CONFIG)
    with store.new_version() as scratch:
        (scratch / "detector.safetensors").write_bytes(b"weights")
        version = store.publish(scratch, {"detector": "patchcore", "image_size": 256})
    store.roll_out(version)
    record = {"score": 0, "result": [], "model_version": version, "anomaly": about}
    store.keep_record(version, 7, record, bumps((64, 80)))
    if picture:
        pixels = np.full((*SHAPE, 3), 200, np.uint8)
        pixels[62:67, 78:83] = 10
        cache = PictureCache(store.folder / "pictures", limit=10**9)
        cache.put("/data/upload/1/a.png", Picture(pixels, (256, 320)), side=256)
    return store


def test_every_answer_brings_a_region_of_its_own(tmp_path: Path) -> None:
    store = stored(tmp_path)
    context = {"result": [region("keypointlabels", 80, 64)]}
    found = [answer(store, [Task(7, {"image": "/data/upload/1/a.png"})], context) for _ in range(2)]
    assert all(one is not None and len(one["result"]) == 1 for one in found)
    assert len({one["result"][0]["id"] for one in found if one}) == 2


def test_the_kept_picture_is_used_and_nothing_is_fetched(tmp_path: Path) -> None:
    task, context = Task(7, {"image": "/data/upload/1/a.png"}), {"result": [region("keypointlabels", 80, 64)]}
    areas = []
    for kept in (False, True):
        found = answer(stored(tmp_path / str(kept), picture=kept), [task], context)
        assert found is not None
        areas.append(int((masks.from_rle(found["result"][0]["value"]["rle"], SHAPE) > 127).sum()))
    assert areas[1] < areas[0]


@pytest.mark.parametrize(
    ("about", "claimed", "size"),
    [
        ({"size": [256, 320]}, (90_000, 90_000), (256, 320)),
        ({}, (256, 320), (256, 320)),
        ({}, (90_000, 90_000), SHAPE),
        ({}, (1, 400_000_000), SHAPE),
        ({}, ("abc", 3), SHAPE),
        ({}, (math.inf, 3), SHAPE),
        ({}, (None, None), SHAPE),
        ({"size": "ab"}, (-1, -1), SHAPE),
    ],
)
def test_an_answer_is_as_large_as_its_image(
    tmp_path: Path, about: dict[str, Any], claimed: tuple[Any, Any], size: tuple[int, int]
) -> None:
    drawn = region("keypointlabels", 80, 64) | dict(zip(("original_height", "original_width"), claimed, strict=True))
    found = answer(stored(tmp_path, **about), [TASK], {"result": [drawn]})
    assert found is not None
    (one,) = found["result"]
    assert (one["original_height"], one["original_width"]) == size


@pytest.mark.parametrize(
    "context", [{}, {"result": None}, {"result": 3}, {"result": {"a": 1}}, {"result": [None, "x"]}]
)
def test_a_context_without_regions_is_not_answered(tmp_path: Path, context: dict[str, Any]) -> None:
    assert answer(stored(tmp_path), [TASK], context) is None


def test_what_is_drawn_on_the_heatmap_is_no_hint(tmp_path: Path) -> None:
    drawn = region("keypointlabels", 80, 64)
    store = stored(tmp_path)
    assert answer(store, [TASK], {"result": [drawn | {"to_name": "anomaly_heatmap"}]}) is None
    assert answer(store, [TASK], {"result": [drawn | {"to_name": "image"}]}) is not None


def test_a_negative_click_alone_is_not_answered(tmp_path: Path) -> None:
    context = {"result": [region("keypointlabels", 80, 64, positive=False)]}
    assert answer(stored(tmp_path), [Task(7, {"image": "/data/upload/1/a.png"})], context) is None


def test_a_large_map_is_answered_in_time() -> None:
    large = np.asarray(np.random.default_rng(0).random((1024, 1024)) * 0.1 + 0.5, np.float32)
    picture = np.random.default_rng(1).integers(0, 255, (1024, 1024, 3), dtype=np.uint8)
    mark = np.zeros(large.shape, np.bool_)
    mark[500, 500] = True
    start = time.process_time()
    defect_at(large, [Hint(mark)], picture=picture)
    assert time.process_time() - start < 1.0
