"""Scores of training images as if they had not been trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from anomaly_workers.detectors.maps import raw_scores
from anomaly_workers.detectors.parallel import each
from anomaly_workers.detectors.scales import Grids, Scales
from anomaly_workers.types import Progress, no_progress

FOLDS = 4
"""Parts that `folds` deals to."""


def held_out_scores(memory: Scales, grids: Sequence[Grids], *, progress: Progress = no_progress) -> list[float]:
    """Return each learnt picture's raw score by what was learnt from the others (leave one out).

    Nothing is fitted again: a bank knows whose patches it holds, and a Gaussian gives up one image in closed form.
    Against fits on three quarters of the images this halves the distance to what new normal images score.
    """

    def scored(place: int) -> float:
        with torch.inference_mode():
            return float(raw_scores(memory.distances(grids[place], without=[(place,)]))[0])

    scores: list[float] = []
    for score in each(scored, range(len(grids)), device=grids[0].device):
        scores.append(score)
        progress(len(scores) / len(grids), "calibrating on held-out images")
    return scores


def folds(count: int, *, seed: int) -> list[list[int]]:
    """Deal indices out to folds at random, as evenly as possible and none empty."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    number = min(FOLDS, count)
    return [sorted(order[start::number]) for start in range(number)]
