"""From an annotation's result to what the annotator said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomaly_workers.errors import ConfigError
from anomaly_workers.labelstudio import masks, words
from anomaly_workers.labelstudio.config import MASK_TAGS
from anomaly_workers.types import Controls

REGION_TYPES = frozenset(tag.lower() for tag in MASK_TAGS)


@dataclass(frozen=True, slots=True, eq=False)
class Mark:
    """One region an annotator left or drew.

    Attributes:
        id: region id; a prediction's region keeps its id when it is submitted.
        origin: "prediction" (untouched), "prediction-changed" or "manual".
        label: its label value, "" if it has none.
        score: the prediction's region score, None for a region drawn by hand.
        mask: (h, w) bool at the size asked for.
    """

    id: str
    origin: str
    label: str
    score: float | None
    mask: NDArray[np.bool_] = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """What one annotation says of its image.

    Attributes:
        anomaly: the verdict: True, False, or None when no choice of the verdict was made.
        mask: (h, w) bool, the union of all marks at the size asked for; all False without marks.
        marks: the regions, in their order.
        unreadable: one reason for every region that could not be read.
    """

    anomaly: bool | None
    mask: NDArray[np.bool_] = field(repr=False)
    marks: tuple[Mark, ...] = ()
    unreadable: tuple[str, ...] = ()


def judgement(result: Sequence[Mapping[str, Any]], controls: Controls, size: tuple[int, int]) -> Judgement:
    """Read an annotation's result; masks come at `size` (height, width). A damaged region is reported, never raised."""
    marks: list[Mark] = []
    unreadable: list[str] = []
    for region in result:
        if not _is_defect_region(region, controls):
            continue
        try:
            marks.append(_mark(region, size))
        except ConfigError as error:
            unreadable.append(str(error))
    union = np.zeros(size, dtype=bool)
    for mark in marks:
        union |= mark.mask
    return Judgement(verdict(result, controls), union, tuple(marks), tuple(unreadable))


def verdict(result: Sequence[Mapping[str, Any]], controls: Controls) -> bool | None:
    """Return True for anomaly, False for normal, None when the verdict control was left empty or says both."""
    if controls.choices is None:
        return None
    chosen: set[Any] = set()
    for region in result:
        value = region.get("value") if isinstance(region, Mapping) else None
        if isinstance(value, Mapping) and region.get("from_name") == controls.choices.name:
            chosen.update(choice for choice in value.get("choices") or () if isinstance(choice, str))
    normal, anomaly = controls.normal in chosen, controls.anomaly in chosen
    return anomaly if normal != anomaly else None


def _is_defect_region(region: Mapping[str, Any], controls: Controls) -> bool:
    kind = region.get("type") if isinstance(region, Mapping) else None
    if not isinstance(kind, str) or kind not in REGION_TYPES:
        return False
    return region.get("to_name") == controls.image and words.meaning(_label(region)) is not False


def _label(region: Mapping[str, Any]) -> str:
    value = region.get("value")
    labels = value.get(region["type"]) if isinstance(value, Mapping) else None
    return labels[0] if isinstance(labels, list) and labels and isinstance(labels[0], str) else ""


def _mark(region: Mapping[str, Any], size: tuple[int, int]) -> Mark:
    score = region.get("score")
    return Mark(
        id=str(region.get("id", "")),
        origin=str(region.get("origin") or "manual"),
        label=_label(region),
        score=float(score) if isinstance(score, int | float) else None,
        mask=_mask(region, size),
    )


def _mask(region: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    if region.get("image_rotation"):
        raise ConfigError(f"Region {region.get('id')} was drawn on a rotated view, which is not supported.")
    value = region.get("value")
    try:
        return _READERS[region["type"]](value, _original(region), size)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"Region {region.get('id')} has no usable {region['type']} value.") from error


def _original(region: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the image the region was drawn on."""
    height, width = int(region["original_height"]), int(region["original_width"])
    if height < 1 or width < 1 or height * width > masks.MAX_PIXELS:
        raise ConfigError(f"Region {region.get('id')} belongs to an image of {width} x {height} pixels.")
    return height, width


def _brush(value: Any, original: tuple[int, int], size: tuple[int, int]) -> NDArray[np.bool_]:
    return masks.reduced(masks.from_rle(value["rle"], original), size)


def _bitmask(value: Any, _original: tuple[int, int], size: tuple[int, int]) -> NDArray[np.bool_]:
    return masks.reduced(masks.from_png(value["imageDataURL"]), size)


def _polygon(value: Any, _original: tuple[int, int], size: tuple[int, int]) -> NDArray[np.bool_]:
    points = [(float(x) / 100, float(y) / 100) for x, y in value["points"]]
    if len(points) < 3:
        raise ValueError("a polygon has at least three points")
    return masks.filled(points, size)


def _rectangle(value: Any, original: tuple[int, int], size: tuple[int, int]) -> NDArray[np.bool_]:
    return masks.filled(corners(value, original), size)


def corners(value: Mapping[str, Any], original: tuple[int, int]) -> list[tuple[float, float]]:
    """Return a rectangle's corners as (x, y) in [0, 1] of an image of `original` (height, width).

    Label Studio turns a rectangle clockwise around its top left corner, in pixels of the original.
    """
    high, wide = original
    left, top = value["x"] / 100 * wide, value["y"] / 100 * high
    width, height = value["width"] / 100 * wide, value["height"] / 100 * high
    turn = math.radians(value.get("rotation") or 0)
    cos, sin = math.cos(turn), math.sin(turn)
    places = ((0.0, 0.0), (width, 0.0), (width, height), (0.0, height))
    return [((left + x * cos - y * sin) / wide, (top + x * sin + y * cos) / high) for x, y in places]


_READERS = {"brushlabels": _brush, "bitmasklabels": _bitmask, "polygonlabels": _polygon, "rectanglelabels": _rectangle}
