"""Which images of an unlabelled, possibly contaminated set to trust as normal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomaly_workers.detectors.crossfit import folds
from anomaly_workers.detectors.maps import raw_scores
from anomaly_workers.detectors.neighbours import nearest, square_norms
from anomaly_workers.detectors.parallel import each
from anomaly_workers.types import Progress, no_progress

BANK = 2000
"""Patches drawn at random from the other folds."""

SMALLEST = 5
"""Fewer images than this say nothing about which of them is odd."""

ROUNDS = 2
"""The second round judges by patches of what the first one kept."""

LEFT_OUT = 0.15
"""Share of the unconfirmed images that is not learnt from, the oddest ones. A normal image too many left out is a false
alarm that one rejection mends; a defect that was learnt from is not shown. More is better where defects are many
(train/good with pool/, a defect for five normal images), less where there are none."""

SHARED = 0.3
"""A look that fewer images than this share have in common is not normal for it: similar defects may repeat."""


def trusted(
    grids: Sequence[Tensor], confirmed: Sequence[bool], *, seed: int, progress: Progress = no_progress
) -> list[int]:
    """Return the indices of the images to remember as normal; confirmed ones always.

    Each image is scored by its distance to patches drawn at random from other folds of the images. Random patches
    follow density: a defect that few images share is hardly ever drawn, where a coreset would seek it out. That is the
    idea of SoftPatch (arXiv 2403.14233): discard by local density before the coreset. Where images are so few that it
    is drawn all the same, the distance is to a farther neighbour, one that a repeated defect does not have.

    The oddest share of the unconfirmed images is left out altogether, so that scoring such an image later does not
    meet its own patches, and the rest judges once more: the refinement of SRR (arXiv 2106.06115, section 3.2).
    """
    count = len(grids)
    least = count - round(LEFT_OUT * (count - sum(confirmed)))
    if count < SMALLEST or all(confirmed):
        return list(range(count))
    keep: NDArray[np.bool_] = np.ones(count, np.bool_)
    for number in range(ROUNDS):
        scores = _scores(grids, keep, seed=seed + number)
        order = np.argsort(np.where(confirmed, -np.inf, scores), kind="stable")
        keep = np.zeros(count, np.bool_)
        keep[order[:least]] = True
        progress((number + 1) / ROUNDS, "looking for images to leave out")
    return [int(index) for index in np.flatnonzero(keep)]


def _scores(grids: Sequence[Tensor], keep: NDArray[np.bool_], *, seed: int) -> NDArray[np.float64]:
    """Return every image's raw score by kept images of other folds."""

    def scored(fold: list[int]) -> list[float]:
        others = [grids[i] for i in range(len(grids)) if keep[i] and i not in fold]
        bank = _random_patches(others, torch.Generator().manual_seed(seed))
        norms = square_norms(bank)
        return [_score(grids[index], bank, norms) for index in fold]

    scores = np.zeros(len(grids))
    parts = folds(len(grids), seed=seed)
    for fold, found in zip(parts, each(scored, parts, device=grids[0].device), strict=True):
        scores[fold] = found
    return scores


def _score(grid: Tensor, bank: Tensor, norms: Tensor) -> float:
    """Return one image's raw score; the rank grows with how often the bank (m, d) was drawn from each place."""
    places = grid.shape[0] * grid.shape[1]
    rank = min(1 + round(SHARED * len(bank) / places), len(bank))
    distances = nearest(grid.flatten(0, 1), bank, norms=norms, rank=rank)
    return float(raw_scores(distances.view(1, *grid.shape[:2]))[0])


def _random_patches(grids: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Draw equally many patches (k, d) of each grid."""
    share = max(1, BANK // len(grids))
    drawn = []
    for grid in grids:
        rows = grid.flatten(0, 1)
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[:share].to(rows.device)])
    return torch.cat(drawn)
