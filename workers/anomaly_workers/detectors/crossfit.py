"""Scores of images by memories that have not seen them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anomaly_workers.detectors.maps import raw_scores
from anomaly_workers.detectors.parallel import each
from anomaly_workers.types import Progress, no_progress

if TYPE_CHECKING:
    from anomaly_workers.detectors.patchwise import Memory

FOLDS = 4
"""Each image is scored by a memory of the other three quarters."""


def held_out_scores(
    kind: type[Memory], grids: Sequence[Tensor], *, seed: int, progress: Progress = no_progress
) -> list[float]:
    """Return the raw score of each image (h, w, d) by a memory learnt from other folds; one image scores itself."""

    def scored(fold: list[int]) -> list[float]:
        others = [grid for index, grid in enumerate(grids) if index not in fold]
        memory = kind.learn(others or grids, seed=seed)
        with torch.inference_mode():
            return [float(raw_scores(memory.distances(grids[index][None]))[0]) for index in fold]

    scores: dict[int, float] = {}
    parts = folds(len(grids), seed=seed)
    for fold, found in zip(parts, each(scored, parts, device=grids[0].device), strict=True):
        scores |= dict(zip(fold, found, strict=True))
        progress(len(scores) / len(grids), "calibrating on held-out images")
    return [scores[index] for index in range(len(grids))]


def folds(count: int, *, seed: int) -> list[list[int]]:
    """Deal indices out to folds at random, as evenly as possible and none empty."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    number = min(FOLDS, count)
    return [sorted(order[start::number]) for start in range(number)]
