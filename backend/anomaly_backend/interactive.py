"""Answers to clicks, boxes and strokes drawn with Auto-annotation on: the defect around them, from the stored map."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from anomaly_workers.errors import ConfigError
from anomaly_workers.labelstudio import config, decode, encode, masks
from anomaly_workers.pictures import PictureCache
from anomaly_workers.store import ProjectStore
from anomaly_workers.types import JSON, Controls, Detection, Region, Task

CORE_SHARE = 0.8
"""A defect surely reaches to where the raw map has fallen to this share of the way from its median to the click. A
patch sees far beyond its own cell, so the map is wider than the defect: shares from 0.3 to 0.9 tried on pool/."""

RIM_SHARE = 0.4
"""Farther out than this share nothing belongs to it; between the two shares the picture decides."""

NEARBY = 0.1875
"""Where the map sees nothing unusual, a defect is no farther from its click than this share of the image's side."""

BELIEVABLE = (0.1, 4.0)
"""What the picture says counts if its area is this many times what the map says; else the colours mislead."""

SIDE = 96
"""Cutting out works on at most this many pixels squared: 20 ms on one core."""

LONGEST = 65_535
"""No side of an image is longer, whatever a hint says: JPEG's own limit."""

PASSES = 2
SEED = 1  # the picture's samples are clustered from a fixed start: the same click gives the same mask

Mask = NDArray[np.bool_]
Pixels = NDArray[np.uint8]
Place = tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Hint:
    """Something drawn by hand.

    Attributes:
        mask: (h, w) bool at the map's resolution: the place of a click, the inside of a box, the pixels of a stroke.
        encloses: the defect is inside (a box, a polygon) and not around (a click, a stroke).
        positive: it shows what belongs to the defect, not what does not.
    """

    mask: Mask
    encloses: bool = False
    positive: bool = True


def answer(project: ProjectStore, tasks: Sequence[Task], context: JSON) -> JSON | None:
    """Return a prediction with one region for the hints drawn, None without a map, a mask control or a hint."""
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
    drawn = [region for region in _listed(context.get("result")) if _is_on(controls, region)]
    size = _size(record, drawn, anomaly_map.shape)
    hints = [found for region in drawn if (found := hint(region, anomaly_map.shape, size=size)) is not None]
    if controls.mask is None or not any(one.positive for one in hints):
        return None
    mask = defect_at(anomaly_map, hints, picture=_picture(project, version, tasks[0], controls))
    region = Region(mask=mask, score=float(anomaly_map[mask].max(initial=0.0)))
    detection = Detection(float(anomaly_map.max()), 0.5, anomaly_map, size)
    full = encode.prediction(tasks[0].id, detection, [region], controls, version)
    # Label Studio adds a region whose id it knows to the region that has it, so every answer brings a new one.
    regions = [
        item | {"id": secrets.token_hex(5)} for item in full["result"] if item["from_name"] == controls.mask.name
    ]
    return {"result": regions, "score": full["score"], "model_version": version}


def hint(region: JSON, shape: tuple[int, ...], *, size: tuple[int, int] | None = None) -> Hint | None:
    """Read a drawn region at the map's shape; None if it has no place. Label Studio marks clicks with Alt negative.

    Args:
        region: what Label Studio sends of it.
        shape: (h, w) of the map.
        size: (height, width) of the image; the map's own where only its proportions matter.
    """
    positive = region.get("is_positive", True) is not False
    value, box = region.get("value"), "rectangle" in str(region.get("type"))
    if not isinstance(value, dict):
        return None
    try:
        if "points" in value:
            points = [(float(x) / 100, float(y) / 100) for x, y in value["points"]]
            mask = masks.filled(points, (shape[0], shape[1]))
        elif "rle" in value:
            original = (int(region["original_height"]), int(region["original_width"]))
            if size is not None and original[0] * original[1] > 4 * size[0] * size[1]:
                return None  # of another image, and perhaps too large to unpack
            mask = masks.reduced(masks.from_rle(value["rle"], original), (shape[0], shape[1]))
        elif box and value.get("rotation"):
            mask = masks.filled(decode.corners(value, size or (shape[0], shape[1])), (shape[0], shape[1]))
        else:
            mask = _window(value, box, shape)
    except (ConfigError, KeyError, TypeError, ValueError, OverflowError):
        return None
    return Hint(mask, "points" in value or box, positive) if mask.any() else None


def defect_at(anomaly_map: NDArray[np.float32], hints: Sequence[Hint], *, picture: Pixels | None = None) -> Mask:
    """Return the defect that the hints show, (h, w) bool.

    All hints of a request belong to one defect: boxes say where it ends, every click or stroke inside adds the part
    around it, and what is nearer to a negative click than to a positive one does not belong to it.

    Args:
        anomaly_map: (h, w) float32 in [0, 1].
        hints: at least one of them positive.
        picture: (h, w, 3) uint8 RGB, the image at the map's resolution, if there is one.
    """
    raw = _raw(anomaly_map)
    limit = _limit(hints, anomaly_map.shape)
    around = [one.mask & limit for one in hints if one.positive and not one.encloses]
    inside = [place for mask in around if (place := _hottest(raw, mask)) is not None]
    if inside:
        parts = [_around(raw, place, limit, calm=anomaly_map[place] < 0.5, picture=picture) for place in inside]
        found = np.logical_or.reduce(parts)
    else:
        found = _within(raw, limit, picture)
    for mask in around:
        found |= mask
    return _without(found, hints)


def _listed(result: object) -> list[JSON]:
    """Return the regions of a context, whatever was sent in their place."""
    return [region for region in result if isinstance(region, dict)] if isinstance(result, list) else []


def _is_on(controls: Controls, region: JSON) -> bool:
    """Whether a region was drawn on the image that the mask belongs to, and not on the heatmap beside it."""
    return controls.mask is not None and region.get("to_name", controls.mask.to_name) == controls.mask.to_name


def _size(record: JSON, drawn: Sequence[JSON], shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the image's (height, width) as its record says; for an older record as the last hint does, or the map."""
    about = record.get("anomaly")
    said: list[object] = [about.get("size") if isinstance(about, dict) else None]
    said += [[region.get("original_height"), region.get("original_width")] for region in drawn[-1:]]
    for sides in said:
        try:
            height, width = (int(side) for side in sides)  # type: ignore[attr-defined]
        except (TypeError, ValueError, OverflowError):
            continue
        if 0 < height <= LONGEST and 0 < width <= LONGEST and height * width <= masks.MAX_PIXELS:
            return height, width
    return shape[0], shape[1]


def _raw(anomaly_map: NDArray[np.float32]) -> NDArray[np.float32]:
    """Undo the calibration up to scale: it flattens peaks, and a share of a flat peak is no place on its slope."""
    share = np.clip(2 * anomaly_map - 1, -0.9999, 0.9999)
    return np.asarray(share / (1 - np.abs(share)), np.float32)


def _limit(hints: Sequence[Hint], shape: tuple[int, ...]) -> Mask:
    enclosing = [one.mask for one in hints if one.positive and one.encloses]
    limit = np.logical_or.reduce(enclosing) if enclosing else np.ones(shape, np.bool_)
    for one in hints:
        if not one.positive and (one.encloses or one.mask.sum() > 1):
            limit = limit & ~one.mask
    return limit


def _around(raw: NDArray[np.float32], place: Place, limit: Mask, *, calm: bool, picture: Pixels | None) -> Mask:
    """Return the defect around a click: the map's core, mended by the picture as far as the map's rim."""
    floor = float(np.median(raw))
    core, rim = (
        raw >= min(floor + share * (float(raw[place]) - floor), float(raw[place])) for share in (CORE_SHARE, RIM_SHARE)
    )
    limit = limit & _disc(raw.shape, place, NEARBY * math.sqrt(raw.size)) if calm else limit
    core, rim = _component(core & limit, place), _component(rim & limit, place)
    return core if picture is None else _mended(core, rim, place, picture)


def _within(raw: NDArray[np.float32], limit: Mask, picture: Pixels | None) -> Mask:
    """Return the defect inside a box: its hotter half, mended by the picture."""
    place = _hottest(raw, limit)
    if place is None:
        return limit
    core = _component(limit & (raw >= float(np.median(raw[limit]))), place)
    return core if picture is None else _mended(core, limit, place, picture)


def _mended(core: Mask, rim: Mask, place: Place, picture: Pixels) -> Mask:
    """Return what GrabCut (Rother et al., SIGGRAPH 2004) makes of the core inside the rim, if that is believable."""
    rows, columns = np.nonzero(rim)
    margin = 12  # pixels of sure background around
    top, left = max(0, int(rows.min()) - margin), max(0, int(columns.min()) - margin)
    window = (slice(top, int(rows.max()) + margin + 1), slice(left, int(columns.max()) + margin + 1))
    small = picture[window]
    scale = min(1.0, SIDE / math.sqrt(small.shape[0] * small.shape[1]))
    size = (max(8, round(small.shape[1] * scale)), max(8, round(small.shape[0] * scale)))
    seed = _disc(core.shape, place, 1.5)
    marks = np.full((size[1], size[0]), cv2.GC_BGD, np.uint8)
    for mask, mark in ((rim, cv2.GC_PR_BGD), (core, cv2.GC_PR_FGD), (seed, cv2.GC_FGD)):
        marks[cv2.resize(mask[window].astype(np.uint8), size, interpolation=cv2.INTER_AREA) > 0] = mark
    if not (marks == cv2.GC_BGD).any() or not (marks & 1).any():
        return core
    colours = np.ascontiguousarray(cv2.resize(small, size, interpolation=cv2.INTER_AREA)[:, :, ::-1])
    cv2.setRNGSeed(SEED)
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(colours, marks, (0, 0, 1, 1), background, foreground, PASSES, cv2.GC_INIT_WITH_MASK)
    cut = np.zeros_like(core)
    height, width = small.shape[:2]
    cut[window] = cv2.resize(marks & 1, (width, height), interpolation=cv2.INTER_NEAREST) == 1
    found = _component((cut & rim) | (seed & rim), place)
    return found if BELIEVABLE[0] <= found.sum() / core.sum() <= BELIEVABLE[1] else core


def _without(found: Mask, hints: Sequence[Hint]) -> Mask:
    """Take away what negative clicks exclude: whatever is nearer to one of them than to every positive hint."""
    negative = [one.mask for one in hints if not one.positive]
    if not negative:
        return found
    excluded = np.logical_or.reduce(negative)
    kept = [one.mask for one in hints if one.positive and not one.encloses]
    if not kept:
        kept = [found & ~_disc_of(excluded)]
    away, near = (_distance(np.asarray(one, np.bool_)) for one in (excluded, np.logical_or.reduce(kept)))
    return np.asarray(found & (near < away), np.bool_)


def _disc_of(places: Mask) -> Mask:
    """The surroundings of negative clicks in a box, where nothing positive says how far they reach."""
    return np.asarray(_distance(places) <= 0.04 * math.sqrt(places.size), np.bool_)


def _distance(places: Mask) -> NDArray[np.float32]:
    """Distance of each pixel to the nearest place; infinite if there is none."""
    if not places.any():
        return np.full(places.shape, np.inf, np.float32)
    return np.asarray(cv2.distanceTransform((~places).astype(np.uint8), cv2.DIST_L2, 5), np.float32)


def _hottest(raw: NDArray[np.float32], where: Mask) -> Place | None:
    if not where.any():
        return None
    row, column = np.unravel_index(int(np.where(where, raw, -np.inf).argmax()), raw.shape)
    return int(row), int(column)


def _component(mask: Mask, place: Place) -> Mask:
    """Return the connected part of a mask around a place, at least the place itself."""
    _count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    found = np.asarray((labels == labels[place]) & mask, np.bool_)
    found[place] = True
    return found


def _disc(shape: tuple[int, ...], place: Place, radius: float) -> Mask:
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    return np.asarray((rows - place[0]) ** 2 + (columns - place[1]) ** 2 <= radius**2, np.bool_)


def _window(value: JSON, box: bool, shape: tuple[int, ...]) -> Mask:
    """Return a click's pixel or a box's pixels, at least one."""
    rows, columns = shape[0], shape[1]
    x, y = float(value["x"]), float(value["y"])
    width, height = (float(value.get("width", 0)), float(value.get("height", 0))) if box else (0.0, 0.0)
    top, left = (max(0, min(int(at / 100 * full), full - 1)) for at, full in ((y, rows), (x, columns)))
    bottom, right = math.ceil((y + height) / 100 * rows), math.ceil((x + width) / 100 * columns)
    mask = np.zeros((rows, columns), np.bool_)
    mask[top : max(bottom if box else 0, top + 1), left : max(right if box else 0, left + 1)] = True
    return mask


def _picture(project: ProjectStore, version: str, task: Task, controls: Controls) -> Pixels | None:
    """Return the image at the map's resolution if a worker left it on this disk; nothing is fetched here."""
    side = int(project.card(version).get("image_size") or 0)
    value = config.image_of(task.data, controls.value) or ""
    kept = PictureCache(project.folder / "pictures", limit=0).get(value, side=side)
    return None if kept is None else kept.pixels
