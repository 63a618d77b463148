"""Scores of images by memories that have not seen them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anomaly_workers.detectors.maps import raw_scores
from anomaly_workers.types import Progress, no_progress

if TYPE_CHECKING:
    from anomaly_workers.detectors.patchwise import Memory

FOLDS = 4
"""Each image is scored by a memory of the other three quarters."""


def held_out_scores(
    kind: type[Memory], grids: Sequence[Tensor], *, seed: int, progress: Progress = no_progress
) -> list[float]:
    """Return the raw score of each image (h, w, d) by a memory learnt from other folds; one image scores itself."""
    if len(grids) == 1:
        return _scores(kind.learn(grids, seed=seed), grids)
    scores = [0.0] * len(grids)
    parts = folds(len(grids), seed=seed)
    for number, fold in enumerate(parts):
        others = [grid for index, grid in enumerate(grids) if index not in fold]
        memory = kind.learn(others, seed=seed)
        for index, score in zip(fold, _scores(memory, [grids[i] for i in fold]), strict=True):
            scores[index] = score
        progress((number + 1) / len(parts), "calibrating on held-out images")
    return scores


def folds(count: int, *, seed: int) -> list[list[int]]:
    """Deal indices out to folds at random, as evenly as possible and none empty."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    number = min(FOLDS, count)
    return [sorted(order[start::number]) for start in range(number)]


def _scores(memory: Memory, grids: Sequence[Tensor]) -> list[float]:
    with torch.inference_mode():
        return [float(raw_scores(memory.distances(grid[None]))[0]) for grid in grids]
