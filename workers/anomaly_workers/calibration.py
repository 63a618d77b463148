"""From distances to scores in [0, 1] with an operating point, learnt from normal images alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

THRESHOLD = 0.5
"""The operating point on the calibrated scale, unless a project's policy moves it."""

PRIOR_WEIGHT = 5.0
"""How many held-out scores the prior on the spread is worth."""

PRIOR_SPREAD = 0.08
"""Gumbel scale over location assumed before any score is seen: between the spreads of smooth and of busy surfaces."""

BODY = 0.05, 0.6
"""Quantiles through which the law is laid where the highest scores are missing: 30 % of defects at the top move them
little."""

_EULER = 0.5772156649015329
_OUTERMOST = 1 - 1e-9


@dataclass(frozen=True, slots=True)
class Calibration:
    """A strictly increasing map of raw scores to (0, 1) that puts the threshold at one half.

    With z = (raw - limit) / unit the score is (1 + z / (1 + |z|)) / 2. It never saturates in float: far out it
    approaches 1 like 1 / z, not like exp(-z). A typical normal image has 1/4, the limit 1/2; an image as far above the
    limit as a typical one is below has 3/4.

    Attributes:
        limit: raw score at the target false-positive rate.
        unit: the limit less the normal images' median raw score.
    """

    limit: float
    unit: float

    def __call__(self, raw: NDArray[np.float32]) -> NDArray[np.float32]:
        """Calibrate raw scores or maps of any shape."""
        z = (raw - np.float32(self.limit)) / np.float32(self.unit)
        return np.asarray(0.5 + 0.5 * z / (1 + np.abs(z)), np.float32)

    def score(self, raw: float) -> float:
        """Calibrate one raw score in double precision."""
        z = (raw - float(np.float32(self.limit))) / self.unit
        return 0.5 + 0.5 * z / (1 + abs(z))

    def raw(self, score: float) -> float:
        """Return the raw score that `score` makes this one of."""
        share = min(max(2 * score - 1, -_OUTERMOST), _OUTERMOST)
        return float(np.float32(self.limit)) + self.unit * share / (1 - abs(share))


def calibrate(held_out: Sequence[float], *, target_fpr: float, left_out: int = 0) -> Calibration:
    """Fit the map to raw scores of normal images that the detector had not seen; see `tail_limit`."""
    centre = _centre(held_out)
    limit = tail_limit(held_out, target_fpr=target_fpr, left_out=left_out)
    return Calibration(limit=limit, unit=max(limit - centre, 1e-6 + 0.01 * centre))


def threshold_at(normals: Sequence[float], calibration: Calibration, *, target_fpr: float, left_out: int = 0) -> float:
    """Return the calibrated score that a normal image passes with probability `target_fpr`.

    Args:
        normals: calibrated scores of normal images that the detector had not seen.
        calibration: what calibrated them.
        target_fpr: any rate, not only the one that the calibration puts at one half.
        left_out: how many odd images are missing among the normals.
    """
    raw = [calibration.raw(score) for score in normals]
    return calibration.score(tail_limit(raw, target_fpr=target_fpr, left_out=left_out))


def tail_limit(held_out: Sequence[float], *, target_fpr: float, left_out: int = 0) -> float:
    """Return the raw score that a normal image passes with probability `target_fpr`.

    An empirical 99 % quantile needs hundreds of normals, so the tail is extrapolated. An image's score is the maximum
    over its patches, and maxima follow an extreme value law (Fisher-Tippett-Gnedenko); the Gumbel law is fitted by
    L-moments (Hosking 1990), which need few samples. Its spread is shrunk to a prior worth a few images, so that two
    scores that happen to agree give no razor-thin margin.

    Where the oddest images were left out, defects or not, the scores lack their tail: the law is then laid through the
    middle of them, as if what is missing lay above.

    Args:
        held_out: raw scores of normal images.
        target_fpr: the probability.
        left_out: how many odd images are missing.
    """
    scores = np.asarray(held_out, np.float64)
    location, scale = gumbel_body(scores, left_out) if left_out else gumbel_fit(scores)
    prior = PRIOR_SPREAD * _centre(held_out)
    spread = (len(scores) * scale + PRIOR_WEIGHT * prior) / (len(scores) + PRIOR_WEIGHT)
    mode = location + _EULER * (scale - spread)  # keeps the mean where it was
    return mode + spread * gumbel_quantile(1 - target_fpr)


def gumbel_fit(scores: NDArray[np.float64]) -> tuple[float, float]:
    """Return location and scale of the Gumbel law with the scores' first two L-moments (Hosking 1990, table 2)."""
    ordered = np.sort(scores)
    n = len(ordered)
    if n < 2:
        return float(ordered.mean()), 0.0
    weights = (2 * np.arange(n) - (n - 1)) / (n * (n - 1))
    scale = float((weights * ordered).sum()) / math.log(2)  # second L-moment = half the mean difference
    return float(ordered.mean()) - _EULER * scale, scale


def gumbel_body(scores: NDArray[np.float64], above: int) -> tuple[float, float]:
    """Return location and scale of the Gumbel law through the middle of the scores, of which `above` more are missing.

    The n-th of all is laid at the probability (n - 0.44) / (count + 0.12), Gringorten's place for this law.
    """
    ordered = np.sort(scores)
    places = (np.arange(1, len(ordered) + 1) - 0.44) / (len(ordered) + above + 0.12)
    body = (places >= BODY[0]) & (places <= BODY[1])
    if body.sum() < 2:
        return gumbel_fit(scores)
    scale, location = np.polyfit(-np.log(-np.log(places[body])), ordered[body], 1)
    return float(location), float(scale)


def gumbel_quantile(share: float) -> float:
    """Return the standard Gumbel law's quantile."""
    return -math.log(-math.log(share))


def _centre(held_out: Sequence[float]) -> float:
    return max(float(np.median(np.asarray(held_out, np.float64))), 1e-6)
