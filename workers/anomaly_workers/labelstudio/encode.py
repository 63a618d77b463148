"""From a detection to the prediction that Label Studio imports."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from anomaly_workers.labelstudio import masks
from anomaly_workers.types import JSON, Control, Controls, Detection, Region

DIGITS = 4
MIN_MARGIN = 1e-6
MOST_SHARES = 10
"""People that tasks can be shared among, see `share_mark`."""


def prediction(task_id: int, detection: Detection, regions: Sequence[Region], controls: Controls, version: str) -> JSON:
    """Return one prediction for `import/predictions`: verdict, a region per component, the number.

    `score` is the confidence: 0 at the threshold, towards 1 far from it, so that the lowest is looked at first.
    """
    result = [*_verdict(detection, controls), *_number(detection, controls)]
    if controls.mask is not None:
        result += [part for region in regions for part in _region(region, detection.size, controls)]
    return {
        "task": task_id,
        "model_version": version,
        "score": confidence(detection),
        "result": [
            {"id": _stable_id(task_id, version, place, detection.score), **part} for place, part in enumerate(result)
        ],
    }


def confidence(detection: Detection) -> float:
    """Return the distance of the score to the threshold, scaled to [0, 1] on either side."""
    above = detection.score >= detection.threshold
    room = 1 - detection.threshold if above else detection.threshold
    share = abs(detection.score - detection.threshold) / max(room, MIN_MARGIN)
    return round(min(max(share, 0.0), 1.0), DIGITS)


def share_mark(share: int, people: int) -> str:
    """Return what stands in the predictions of a share of the tasks, and in no other share's; no hexadecimal digits."""
    return f"_{people}{'ghijklmnop'[share]}"


def _verdict(detection: Detection, controls: Controls) -> list[JSON]:
    if controls.choices is None:
        return []
    choice = controls.anomaly if detection.is_anomaly else controls.normal
    return [
        {
            "from_name": controls.choices.name,
            "to_name": controls.choices.to_name,
            "type": "choices",
            "value": {"choices": [choice]},
            "score": _rounded(detection.score),
        }
    ]


def _number(detection: Detection, controls: Controls) -> list[JSON]:
    if controls.number is None:
        return []
    return [
        {
            "from_name": controls.number.name,
            "to_name": controls.number.to_name,
            "type": "number",
            "value": {"number": _on_step(detection.score, controls.number)},
        }
    ]


def _on_step(score: float, number: Control) -> float:
    """Return the value nearest to the score that the Number tag accepts: another would make Submit fail."""
    if not number.step:
        return _rounded(score)
    steps = round((score - number.least) / number.step)
    return round(number.least + steps * number.step, 10)


def _region(region: Region, size: tuple[int, int], controls: Controls) -> list[JSON]:
    assert controls.mask is not None
    if not region.mask.any():
        return []
    kind = controls.mask.tag.lower()
    value = _VALUES[controls.mask.tag](region.mask, size)
    return [
        {
            "from_name": controls.mask.name,
            "to_name": controls.mask.to_name,
            "type": kind,
            "value": {**value, kind: [controls.mask_label]},
            "score": _rounded(region.score),
            "original_width": size[1],
            "original_height": size[0],
            "image_rotation": 0,
        }
    ]


def _brush(mask: NDArray[np.bool_], size: tuple[int, int]) -> JSON:
    return {"format": "rle", "rle": masks.to_rle(mask, size)}


def _bitmask(mask: NDArray[np.bool_], size: tuple[int, int]) -> JSON:
    return {"imageDataURL": masks.to_png(mask, size)}


def _polygon(mask: NDArray[np.bool_], _size: tuple[int, int]) -> JSON:
    points = [[round(100 * x, DIGITS), round(100 * y, DIGITS)] for x, y in masks.outline(mask)]
    return {"points": points, "closed": True}


def _rectangle(mask: NDArray[np.bool_], _size: tuple[int, int]) -> JSON:
    left, top, right, bottom = masks.box(mask)
    x, y, width, height = (round(100 * value, DIGITS) for value in (left, top, right - left, bottom - top))
    return {"x": x, "y": y, "width": width, "height": height, "rotation": 0}


_VALUES: dict[str, Callable[[NDArray[np.bool_], tuple[int, int]], JSON]] = {
    "BrushLabels": _brush,
    "BitmaskLabels": _bitmask,
    "PolygonLabels": _polygon,
    "RectangleLabels": _rectangle,
}


def _stable_id(task_id: int, version: str, place: int, score: float) -> str:
    """The same for the same task, version and place, so that a prediction made twice is equal.

    It begins with the anomaly score and ends with the shares the task belongs to: the Data Manager can neither sort
    nor filter by such things, but it does both by a prediction's text.
    """
    digest = hashlib.sha256(f"{task_id}:{version}:{place}".encode()).hexdigest()
    shares = "".join(share_mark(task_id % people, people) for people in range(2, MOST_SHARES + 1))
    return f"{min(int(score * 10_000), 9_999):04d}{digest[:8]}{shares}"


def _rounded(score: float) -> float:
    return round(min(max(float(score), 0.0), 1.0), DIGITS)
