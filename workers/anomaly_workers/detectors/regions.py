"""Connected components of an anomaly map."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from anomaly_workers.types import Detection, Region

MAX_REGIONS = 32
"""More than a person corrects; the highest scoring stay."""

MIN_SHARE = 0.0003
"""Smaller components, as a share of the map, are specks: 20 of 256 x 256 pixels."""

_EIGHT = np.ones((3, 3), np.bool_)


def regions(detection: Detection, *, min_share: float = MIN_SHARE, limit: int = MAX_REGIONS) -> list[Region]:
    """Return the components at or above the threshold, highest score first.

    A normal image has none, an anomaly at least one: where all are specks, the highest scoring speck stays.

    Args:
        detection: what a detector said.
        min_share: components smaller than this share of the map are left out.
        limit: most regions returned.
    """
    if not detection.is_anomaly:
        return []
    values = detection.anomaly_map
    cut = min(detection.threshold, float(values.max()))  # a score can pass a threshold that float32 maps just miss
    labels, count = ndimage.label(values >= cut, structure=_EIGHT)
    inside = labels > 0
    peaks = np.zeros(count, np.float64)
    np.maximum.at(peaks, labels[inside] - 1, values[inside])  # ndimage.maximum sorts the whole map
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    order = np.argsort(-peaks, kind="stable")
    large = [i for i in order if areas[i] >= min_share * values.size] or [order[0]]
    return [Region(mask=_mask(labels, i + 1), score=float(peaks[i])) for i in large[:limit]]


def _mask(labels: NDArray[np.int32], label: int) -> NDArray[np.bool_]:
    return np.asarray(labels == label, np.bool_)
