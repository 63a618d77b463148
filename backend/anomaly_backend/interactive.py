"""Answers to a click, a box or a stroke drawn with Auto-annotation on: the defect around it, from the stored map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from anomaly_workers.errors import ConfigError
from anomaly_workers.labelstudio import config, encode
from anomaly_workers.store import ProjectStore
from anomaly_workers.types import JSON, Detection, Region, Task

SHARE_OF_PEAK = 0.6
"""A defect ends where the map has fallen to this share of the way from the map's median to its peak in the hint."""

Window = tuple[int, int, int, int]


def answer(project: ProjectStore, tasks: Sequence[Task], context: JSON) -> JSON | None:
    """Return a prediction with one region for the last drawn hint, None without a map, a mask control or a hint."""
    version = project.current
    if not tasks or not version:
        return None
    anomaly_map, record = project.anomaly_map(version, tasks[0].id), project.record(version, tasks[0].id)
    if anomaly_map is None or record is None:
        return None
    try:
        controls = config.parse(project.label_config)
    except ConfigError:
        return None
    drawn = [region for region in context.get("result", []) if isinstance(region, dict)]
    window = hint_window(drawn[-1], anomaly_map.shape) if drawn else None
    if window is None or controls.mask is None:
        return None
    size = (int(drawn[-1].get("original_height") or 0), int(drawn[-1].get("original_width") or 0))
    size = size if min(size) > 0 else (anomaly_map.shape[0], anomaly_map.shape[1])
    mask = defect_at(anomaly_map, window)
    region = Region(mask=mask, score=float(anomaly_map[mask].max()))
    detection = Detection(float(anomaly_map.max()), 0.5, anomaly_map, size)
    full = encode.prediction(tasks[0].id, detection, [region], controls, version)
    regions = [item for item in full["result"] if item["from_name"] == controls.mask.name]
    return {"result": regions, "score": full["score"], "model_version": version}


def hint_window(region: JSON, shape: tuple[int, ...]) -> Window | None:
    """Return the hint as (top, left, bottom, right) in map pixels, at least one pixel; None if it has no place."""
    value = region.get("value", {})
    if "points" in value:
        xs, ys = zip(*value["points"], strict=True)
        x, y, width, height = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    elif "x" in value and "y" in value:
        x, y = value["x"], value["y"]
        width, height = (value.get("width", 0), value.get("height", 0)) if "rectangle" in str(region) else (0, 0)
    else:
        return None
    rows, columns = shape[0], shape[1]
    top, left = min(int(y / 100 * rows), rows - 1), min(int(x / 100 * columns), columns - 1)
    bottom, right = int(np.ceil((y + height) / 100 * rows)), int(np.ceil((x + width) / 100 * columns))
    top, left = max(top, 0), max(left, 0)
    return top, left, max(min(bottom, rows), top + 1), max(min(right, columns), left + 1)


def defect_at(anomaly_map: NDArray[np.float32], window: Window) -> NDArray[np.bool_]:
    """Return the connected part of the map around the hottest pixel of the hint, (h, w) bool, never empty."""
    top, left, bottom, right = window
    inside = anomaly_map[top:bottom, left:right]
    row, column = np.unravel_index(int(inside.argmax()), inside.shape)
    peak = (top + int(row), left + int(column))
    floor = float(np.median(anomaly_map))
    level = floor + SHARE_OF_PEAK * (float(anomaly_map[peak]) - floor)
    canvas = Image.fromarray((anomaly_map >= level).astype(np.uint8)).copy()  # its own memory, writable
    ImageDraw.floodfill(canvas, (peak[1], peak[0]), 2)
    filled: NDArray[np.bool_] = np.asarray(canvas) == 2
    if bottom - top > 1 and right - left > 1:  # a box says where the defect ends, a click does not
        box = np.zeros_like(filled)
        box[top:bottom, left:right] = True
        filled = filled & box
    return filled
