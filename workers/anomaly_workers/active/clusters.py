"""Groups of images that look alike, so that Label Studio's uncertainty sampling shows one of each in turn."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from anomaly_workers.active.strategies import Pool

UNSUSPICIOUS = 0
"""The cluster of everything that looks normal: it gets one turn in `GROUPS` + 1, however large it is."""

GROUPS = 7
"""Clusters among suspicious images."""

SUSPICIOUS_SHARE = 0.2
"""At least this share of the open images is taken as suspicious."""


def clusters(pool: Pool, known: Mapping[int, int]) -> NDArray[np.int64]:
    """Return the cluster (n,) of each image: `UNSUSPICIOUS`, or 1 to `GROUPS` by what its hottest patches look like.

    Label Studio serves the least solved cluster first. Were normal images clustered by looks, defects would wait for
    their turn among scenes and batches; so all of them share one cluster.

    Args:
        pool: the open images.
        known: clusters by task id that suspicious images should keep, so that few predictions change.
    """
    found = np.zeros(len(pool), np.int64)
    suspicious = np.flatnonzero(pool.scores >= min(pool.threshold, _level(pool.scores)))
    if not len(suspicious):
        return found
    rows = pool.embeddings[suspicious]
    kept = np.asarray([known.get(int(task), 0) for task in pool.tasks[suspicious]])
    if not kept.any():
        groups = min(GROUPS, len(np.unique(rows, axis=0)))
        found[suspicious] = 1 + KMeans(groups, n_init=3, random_state=0).fit_predict(rows)
        return found
    names = np.unique(kept[kept > 0])
    centres = np.stack([rows[kept == name].mean(axis=0) for name in names])  # (k, d)
    away = ((rows[:, None] - centres[None]) ** 2).sum(axis=2)  # (s, k)
    found[suspicious] = np.where(kept > 0, kept, names[away.argmin(axis=1)])
    return found


def _level(scores: NDArray[np.float64]) -> float:
    return float(np.quantile(scores, 1 - SUSPICIOUS_SHARE)) if len(scores) else 1.0
