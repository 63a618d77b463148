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

RUNS = 3
"""Runs of neighbouring images in each fold."""


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
    parts = folds(len(grids), seed=seed, runs=RUNS)
    for fold, found in zip(parts, each(scored, parts, device=grids[0].device), strict=True):
        scores |= dict(zip(fold, found, strict=True))
        progress(len(scores) / len(grids), "calibrating on held-out images")
    return [scores[index] for index in range(len(grids))]


def folds(count: int, *, seed: int, runs: int) -> list[list[int]]:
    """Deal runs of neighbouring indices out to folds at random; none is empty.

    Pictures that came one after the other are often nearly alike, and one in the bank would make the other's held-out
    score too good: blocked cross-validation (Roberts et al., Ecography 2017). A few runs a fold keep a kind of picture
    that came together from falling into one fold whole; `runs` of `count` or more is plain dealing.
    """
    number = min(FOLDS, count)
    blocks = [block.tolist() for block in torch.arange(count).tensor_split(min(runs * number, count))]
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()
    return [sorted(i for place in order[start::number] for i in blocks[place]) for start in range(number)]
