"""How well scores and maps separate anomalies from normal images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

Floats = NDArray[np.float32] | NDArray[np.float64]
Flags = NDArray[np.bool_]

FPR_LIMIT = 0.3
"""Upper end of the integral of AUPRO (MVTec AD, Bergmann et al. 2021, section 5.3)."""

_EIGHT = np.ones((3, 3), np.bool_)


def auroc(labels: Flags, scores: Floats) -> float | None:
    """Return the area under the ROC curve, None where only one kind is present."""
    return float(roc_auc_score(labels, scores)) if _both(labels) else None


def average_precision(labels: Flags, scores: Floats) -> float | None:
    """Return the area under the precision-recall curve as average precision, None where only one kind is present."""
    return float(average_precision_score(labels, scores)) if _both(labels) else None


def f1_max(labels: Flags, scores: Floats) -> float | None:
    """Return the best F1 over all thresholds, None where only one kind is present."""
    if not _both(labels):
        return None
    precision, recall, _ = precision_recall_curve(labels, scores)
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-12)))


def rates(labels: Flags, verdicts: Flags) -> tuple[float | None, float | None]:
    """Return the false-positive rate and the recall of verdicts, None where there is nothing to count."""
    fpr = float(verdicts[~labels].mean()) if (~labels).any() else None
    recall = float(verdicts[labels].mean()) if labels.any() else None
    return fpr, recall


def pixel_auroc(masks: Sequence[Flags], maps: Sequence[Floats]) -> float | None:
    """Return the AUROC over all pixels of all images; a mask (h, w) has its map's shape."""
    labels = np.concatenate([mask.ravel() for mask in masks])
    return auroc(labels, np.concatenate([values.ravel() for values in maps]))


def aupro(masks: Sequence[Flags], maps: Sequence[Floats], *, limit: float = FPR_LIMIT) -> float | None:
    """Return the area under the per-region-overlap curve up to a false-positive rate, divided by that rate.

    At a threshold, overlap is the mean over all connected components of the part of them that is found, so that a
    small defect counts as much as a large one. A pixel of a component adds 1 / (its area x components) to it, a normal
    pixel adds 1 / (normal pixels) to the false-positive rate: one sort of all pixels gives the whole, exact curve.
    Section 5.3 of Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 2021.

    Args:
        masks: (h, w) True where abnormal.
        maps: (h, w) anomaly maps, higher is more abnormal.
        limit: false-positive rate up to which is integrated.
    """
    weights = _overlap_weights(masks)  # one value a pixel, 0 outside components
    values = np.concatenate([anomaly_map.ravel() for anomaly_map in maps])
    normal = weights == 0
    if normal.all() or not normal.any():
        return None
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order], append=np.nan) != 0)  # last pixel of each distinct value
    overlap = np.concatenate([[0.0], np.cumsum(weights[order])[ends]])
    fpr = np.concatenate([[0.0], np.cumsum(normal[order])[ends] / normal.sum()])
    inside = fpr <= limit
    x = np.append(fpr[inside], limit)
    y = np.append(overlap[inside], np.interp(limit, fpr, overlap))
    area = float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())  # trapezoids
    return area / limit


def _overlap_weights(masks: Sequence[Flags]) -> NDArray[np.float64]:
    parts = []
    components = 0
    for mask in masks:
        labels, count = ndimage.label(mask, structure=_EIGHT)
        areas = np.bincount(labels.ravel(), minlength=count + 1).astype(np.float64)
        share = np.divide(1.0, areas, out=np.zeros_like(areas), where=areas > 0)
        share[0] = 0.0
        parts.append(share[labels.ravel()])
        components += count
    return np.asarray(np.concatenate(parts) / max(1, components), np.float64)


def _both(labels: Flags) -> bool:
    return bool(labels.any() and not labels.all())
