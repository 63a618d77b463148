"""Annotations read back: round trips of every mask control, browser recordings, damaged regions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from anomaly_workers.labelstudio import decode, encode, masks
from anomaly_workers.types import JSON, Control, Controls, Detection, Region

ANNOTATIONS: dict[str, Any] = json.loads((Path(__file__).parent / "payloads/annotations.json").read_text())
SIZE = (48, 64)


def controls(tag: str = "BrushLabels") -> Controls:
    return Controls(
        image="image",
        value="image",
        choices=Control("Choices", "cls", "image", ("normal", "anomaly")),
        normal="normal",
        anomaly="anomaly",
        mask=Control(tag, "mask", "image", ("Defect",)),
        mask_label="Defect",
    )


def disc(top: int, left: int, radius: int) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    found: NDArray[np.bool_] = (rows - top) ** 2 + (columns - left) ** 2 <= radius**2
    return found


def rectangle() -> NDArray[np.bool_]:
    mask = np.zeros(SIZE, bool)
    mask[10:30, 20:50] = True
    return mask


def overlap(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    return float((one & other).sum() / (one | other).sum())


def sent(mask: NDArray[np.bool_], tag: str, original: tuple[int, int]) -> list[JSON]:
    detection = Detection(0.9, 0.5, mask.astype(np.float32), original)
    result: list[JSON] = encode.prediction(1, detection, [Region(mask, 0.7)], controls(tag), "v")["result"]
    return result


@pytest.mark.parametrize("original", [(48, 64), (480, 640), (1000, 500), (37, 91)])
@pytest.mark.parametrize(
    ("tag", "least"), [("BrushLabels", 0.93), ("BitmaskLabels", 0.93), ("PolygonLabels", 0.9), ("RectangleLabels", 0.7)]
)
def test_what_is_sent_comes_back(tag: str, least: float, original: tuple[int, int]) -> None:
    mask = disc(20, 30, 12)
    found = decode.judgement(sent(mask, tag, original), controls(tag), SIZE)
    assert found.anomaly is True
    assert [mark.label for mark in found.marks] == ["Defect"]
    assert found.marks[0].score == 0.7
    assert overlap(found.mask, mask) > least


@pytest.mark.parametrize("tag", ["BrushLabels", "BitmaskLabels", "PolygonLabels", "RectangleLabels"])
@pytest.mark.parametrize("mask", [disc(0, 0, 8), disc(47, 63, 5), rectangle(), disc(20, 30, 0)])
def test_edges_corners_and_single_pixels_come_back(tag: str, mask: NDArray[np.bool_]) -> None:
    found = decode.judgement(sent(mask, tag, (960, 1280)), controls(tag), SIZE)
    assert overlap(found.mask, mask) > (0.7 if mask.sum() > 1 else 0.2)


def test_two_regions_stay_apart_and_join_in_the_union() -> None:
    first, second = disc(10, 10, 5), disc(35, 50, 6)
    detection = Detection(0.9, 0.5, first.astype(np.float32), (96, 128))
    regions = [Region(first, 0.8), Region(second, 0.7)]
    result = encode.prediction(1, detection, regions, controls(), "v")["result"]
    found = decode.judgement(result, controls(), SIZE)
    assert [overlap(mark.mask, mask) > 0.9 for mark, mask in zip(found.marks, (first, second), strict=True)] == [
        True
    ] * 2
    assert (found.mask == found.marks[0].mask | found.marks[1].mask).all()


@pytest.mark.parametrize("name", sorted(ANNOTATIONS))
def test_regions_that_a_browser_edited_are_read(name: str) -> None:
    result = ANNOTATIONS[name]
    expected = True if any(region["type"] == "choices" for region in result) else None
    named = Controls("image", "image", Control("Choices", "cls", "image"), "normal", "anomaly")
    found = decode.judgement(result, named, (128, 128))
    assert found.anomaly is expected
    assert found.unreadable == ()
    assert {mark.origin for mark in found.marks} <= {"prediction", "prediction-changed", "manual"}
    assert 0 < found.mask.mean() < 0.5


def test_a_turned_rectangle_turns_around_its_corner() -> None:
    value = {"x": 50, "y": 25, "width": 20, "height": 10, "rotation": 90, "rectanglelabels": ["Defect"]}
    region = _region("rectanglelabels", value, (100, 200))
    found = decode.judgement([region], controls(), (100, 200))
    rows, columns = np.nonzero(found.mask)
    assert (rows.min(), rows.max()) == pytest.approx((25, 64), abs=1)  # 20 % of 200 px, downwards
    assert (columns.min(), columns.max()) == pytest.approx((90, 99), abs=1)  # 10 % of 100 px, to the left


def test_soft_alpha_counts_above_a_half() -> None:
    alpha = np.array([[0, 100, 127], [128, 200, 255]], dtype=np.uint8)
    assert masks.reduced(alpha, (2, 3)).tolist() == [[False] * 3, [True] * 3]


def test_a_mark_smaller_than_a_cell_does_not_vanish() -> None:
    alpha = np.zeros((4000, 4000), np.uint8)
    alpha[2000, 1000] = 255
    found = masks.reduced(alpha, (64, 64))
    assert np.argwhere(found).tolist() == [[32, 16]]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(["normal"], False), (["anomaly"], True), ([], None), (["normal", "anomaly"], None), (["unsure"], None)],
)
def test_the_verdict_is_what_was_chosen(chosen: list[str], expected: bool | None) -> None:
    result = [{"from_name": "cls", "to_name": "image", "type": "choices", "value": {"choices": chosen}}]
    assert decode.verdict(result, controls()) is expected


def test_regions_of_other_images_and_of_nothing_wrong_are_left_out() -> None:
    value = {"x": 10, "y": 10, "width": 20, "height": 10}
    other = _region("rectanglelabels", value | {"rectanglelabels": ["Defect"]}) | {"to_name": "golden"}
    fine = _region("rectanglelabels", value | {"rectanglelabels": ["background"]})
    found = decode.judgement([other, fine], controls(), SIZE)
    assert found.marks == ()
    assert not found.mask.any()


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("brushlabels", {"rle": [1, 2, 3]}),
        ("brushlabels", {"rle": "x"}),
        ("brushlabels", None),
        ("bitmasklabels", {"imageDataURL": "data:image/png;base64,AAAA"}),
        ("bitmasklabels", {"imageDataURL": "http://elsewhere"}),
        ("bitmasklabels", {"imageDataURL": 5}),
        ("polygonlabels", {"points": [[1, 2]]}),
        ("polygonlabels", {"points": [[float("nan"), 2], [1, 2], [2, 2]]}),
        ("rectanglelabels", {"x": "a"}),
        ("rectanglelabels", {}),
    ],
)
def test_a_damaged_region_is_reported_and_the_rest_is_read(kind: str, value: object) -> None:
    good = _region("rectanglelabels", {"x": 10, "y": 10, "width": 20, "height": 10})
    found = decode.judgement([_region(kind, value), good], controls(), SIZE)
    assert len(found.unreadable) == 1
    assert len(found.marks) == 1


@pytest.mark.parametrize(
    "size", [{}, {"original_width": 0, "original_height": 5}, {"original_width": 10**6, "original_height": 10**6}]
)
def test_a_region_without_a_sensible_size_is_reported(size: JSON) -> None:
    region = {
        "id": "r",
        "to_name": "image",
        "type": "rectanglelabels",
        "value": {"x": 1, "y": 1, "width": 1, "height": 1},
    }
    assert len(decode.judgement([region | size], controls(), SIZE).unreadable) == 1


def test_a_region_on_a_rotated_view_is_reported() -> None:
    region = _region("rectanglelabels", {"x": 10, "y": 10, "width": 20, "height": 10}) | {"image_rotation": 90}
    assert "rotated" in decode.judgement([region], controls(), SIZE).unreadable[0]


def _region(kind: str, value: object, original: tuple[int, int] = SIZE) -> JSON:
    return {
        "id": "r",
        "from_name": "mask",
        "to_name": "image",
        "type": kind,
        "value": value,
        "original_width": original[1],
        "original_height": original[0],
    }
