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

SHOWN = 20
"""Patches of each confirmed defect that are taken to show it, the farthest from normal."""

LIKENESS = 0.5
"""How much likeness to a confirmed defect counts beside oddness, each in its own standard deviations. With 13 of 36
defects among 216 images confirmed, 5.7 instead of 7.3 of the other 23 were still learnt from on ball_screw, 16.0
instead of 17.7 of 31 on magnetic_tile, the means of three draws."""


def trusted(
    grids: Sequence[Tensor],
    confirmed: Sequence[bool],
    *,
    defects: Sequence[Tensor] = (),
    seed: int,
    progress: Progress = no_progress,
) -> list[int]:
    """Return the indices of the images to remember as normal; confirmed ones always.

    Each image is scored by its distance to patches drawn at random from other folds of the images. Random patches
    follow density: a defect that few images share is hardly ever drawn, where a coreset would seek it out. That is the
    idea of SoftPatch (arXiv 2403.14233): discard by local density before the coreset. Where images are so few that it
    is drawn all the same, the distance is to a farther neighbour, one that a repeated defect does not have.

    The oddest share of the unconfirmed images is left out altogether, so that scoring such an image later does not
    meet its own patches, and the rest judges once more: the refinement of SRR (arXiv 2106.06115, section 3.2). What
    looks like a confirmed defect is odder than it looks alone: other defects of its kind are still among the images.

    Args:
        grids: (h, w, d) of each image.
        confirmed: which of them somebody called normal.
        defects: (h, w, d) of images that somebody called anomalous; none of `grids`.
        seed: makes folds and draws repeatable.
        progress: told the done fraction; may raise to cancel.
    """
    count = len(grids)
    least = count - round(LEFT_OUT * (count - sum(confirmed)))
    if count < SMALLEST or all(confirmed):
        return list(range(count))
    keep: NDArray[np.bool_] = np.ones(count, np.bool_)
    for number in range(ROUNDS):
        scores = _scores(grids, keep, defects, seed=seed + number)
        order = np.argsort(np.where(confirmed, -np.inf, scores), kind="stable")
        keep = np.zeros(count, np.bool_)
        keep[order[:least]] = True
        progress((number + 1) / ROUNDS, "looking for images to leave out")
    return [int(index) for index in np.flatnonzero(keep)]


def _scores(
    grids: Sequence[Tensor], keep: NDArray[np.bool_], defects: Sequence[Tensor], *, seed: int
) -> NDArray[np.float64]:
    """Return how odd every image is, judged by kept images of other folds and by confirmed defects."""

    def scored(fold: list[int]) -> list[tuple[float, float]]:
        others = [grids[i] for i in range(len(grids)) if keep[i] and i not in fold]
        bank = _random_patches(others, torch.Generator().manual_seed(seed))
        norms = square_norms(bank)
        shown = _shown(defects, bank, norms)
        return [_score(grids[index], bank, norms, shown) for index in fold]

    scores = np.zeros((len(grids), 2))
    parts = folds(len(grids), seed=seed)
    for fold, found in zip(parts, each(scored, parts, device=grids[0].device), strict=True):
        scores[fold] = found
    odd, like = scores.T
    if not defects:
        return odd
    return np.asarray(odd / (odd.std() + 1e-9) + LIKENESS * like / (like.std() + 1e-9), np.float64)


def _score(grid: Tensor, bank: Tensor, norms: Tensor, shown: Tensor) -> tuple[float, float]:
    """Return one image's raw score, and how much nearer than to the bank (m, d) it comes to defects' patches (k, d).

    The rank of the neighbour grows with how often the bank was drawn from each place.
    """
    places, rows = grid.shape[0] * grid.shape[1], grid.flatten(0, 1)
    rank = min(1 + round(SHARED * len(bank) / places), len(bank))
    away = nearest(rows, bank, norms=norms, rank=rank)
    odd = float(raw_scores(away.view(1, *grid.shape[:2]))[0])
    if not len(shown):
        return odd, 0.0
    nearer = (nearest(rows, bank, norms=norms) if rank > 1 else away) - nearest(rows, shown)
    return odd, float(raw_scores(nearer.view(1, *grid.shape[:2]))[0])


def _shown(defects: Sequence[Tensor], bank: Tensor, norms: Tensor) -> Tensor:
    """Return the patches (k, d) of defects (h, w, d) that are farthest from the bank (m, d)."""
    found = [bank[:0]]
    for grid in defects:
        rows = grid.flatten(0, 1)
        found.append(rows[nearest(rows, bank, norms=norms).topk(min(SHOWN, len(rows))).indices])
    return torch.cat(found)


def _random_patches(grids: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """Draw equally many patches (k, d) of each grid."""
    share = max(1, BANK // len(grids))
    drawn = []
    for grid in grids:
        rows = grid.flatten(0, 1)
        drawn.append(rows[torch.randperm(len(rows), generator=generator)[:share].to(rows.device)])
    return torch.cat(drawn)
