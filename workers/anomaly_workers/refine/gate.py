"""The gate: a challenger replaces the champion only if the confirmed images say that it is better."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anomaly_workers.calibration import THRESHOLD

FEWEST = 3
"""Confirmed images of either kind below which nothing can be compared."""

RESAMPLES = 4000

CONFIDENCE = 0.8
"""Least share of the resamples in which the challenger gives defects a higher margin."""

WORSE = 0.5
"""The challenger must rank as well in this share of the resamples: what probably ranks worse is not better. With .2 and
three of ten verdicts flipped a head passed that ranked new images at .968 instead of 1."""

AS_WELL = 0.004
"""Image AUROC that may be lost and still be called as well, a margin of non-inferiority: one pair in 250 that changes
order is no reason to leave defects near the threshold. With .01 and flipped verdicts a head passed whose confirmed
images ranked at .840 instead of .845 and new ones at .958 instead of 1."""

FALSE_ALARMS = 0.05
"""Share of confirmed normals by which false alarms may grow without further question. People review suspicious images
first, so the confirmed normals are the hardest ones, and a champion that learnt from hidden defects hardly alarms at
all: a better challenger does raise more alarms among them, see `Quiet`."""

MOST_ALARMS = 1 / 3
"""Share of confirmed normals that may raise an alarm after such growth."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One confirmed image, scored by both; neither has learnt from it.

    Attributes:
        task: task id.
        anomaly: what the annotators say.
        champion: the deployed version's score in [0, 1].
        challenger: the score of a model trained without the image, in [0, 1].
    """

    task: int
    anomaly: bool
    champion: float
    challenger: float


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Where each of the two raises an alarm; rules other than a number put it elsewhere on each one's scale."""

    champion: float = THRESHOLD
    challenger: float = THRESHOLD


@dataclass(frozen=True, slots=True)
class Figures:
    """How well one of the two does on the confirmed images, at its own threshold.

    Attributes:
        auroc: image AUROC.
        margin: mean score of the defects, on a scale where one half is what one normal image in a hundred reaches.
        recall: share of the defects at or above the threshold.
        false_positive_rate: share of the normals at or above the threshold.
    """

    auroc: float
    margin: float
    recall: float
    false_positive_rate: float


@dataclass(frozen=True, slots=True)
class Quiet:
    """How the challenger would do if its threshold were raised to as few false alarms as the champion's.

    Attributes:
        recall: share of the defects that it would still find.
        apart: share of the resamples in which defects rise by more than normals do.
    """

    recall: float
    apart: float


@dataclass(frozen=True, slots=True)
class Decision:
    """The gate's answer.

    Attributes:
        promote: whether the challenger replaces the champion.
        reason: why, in one sentence.
        probability: share of the resamples in which the challenger's margin is higher.
        defects, normals: confirmed images of either kind.
        champion, challenger: figures of both, None where one kind is missing.
        dropped: tasks that the champion has on the right side of the threshold and the challenger has not.
    """

    promote: bool
    reason: str
    probability: float
    defects: int
    normals: int
    champion: Figures | None = None
    challenger: Figures | None = None
    dropped: tuple[int, ...] = ()

    def card(self) -> dict[str, Any]:
        """Return it for a version's card."""
        return asdict(self)


def decide(trials: Sequence[Trial], *, thresholds: Thresholds = Thresholds(), seed: int = 0) -> Decision:
    """Compare on the same images, with the Bayesian bootstrap (Rubin 1981) over them.

    Ten images hardly move an AUROC: it counts few pairs, and most often is 1 before and after. How far defects stand
    out over the normal images' tail says more, so the challenger has to raise that margin in four of five weightings.
    It must not, more likely than not, rank worse by more than `AS_WELL`, nor lose a defect net of those it gains. False
    alarms may grow by more than a twentieth of the normals, to a third of them at most, only if defects rise more than
    normals do, in four of five weightings, and if it finds as many defects with as few false alarms as the champion.
    """
    labels = np.array([trial.anomaly for trial in trials], np.bool_)
    defects, normals = int(labels.sum()), int((~labels).sum())
    if not defects and normals >= FEWEST:
        return _by_alarms(trials, thresholds)
    if min(defects, normals) < FEWEST:
        reason = f"{defects} confirmed defects and {normals} confirmed normals: the gate needs {FEWEST} of each"
        return Decision(False, reason, 0.5, defects, normals)
    old = np.array([trial.champion for trial in trials], np.float64)
    new = np.array([trial.challenger for trial in trials], np.float64)
    before, after = _figures(labels, old, thresholds.champion), _figures(labels, new, thresholds.challenger)
    random = np.random.default_rng(seed)
    probability = _agreement((new - old)[labels][:, None], random)
    ranks_as_well = _agreement(_wins(labels, new) - _wins(labels, old) + AS_WELL, random)
    dropped = _dropped(trials, thresholds)
    gain = new - old
    apart = _agreement(gain[labels][:, None] - gain[~labels][None, :], random)
    quiet = Quiet(_recall_at(new, labels, before.false_positive_rate), apart)
    promote, reason = _judged(before, after, probability, ranks_as_well, quiet)
    return Decision(promote, reason, round(probability, 4), defects, normals, before, after, dropped)


def _by_alarms(trials: Sequence[Trial], thresholds: Thresholds) -> Decision:
    """Decide where no defect is confirmed: without one only false alarms can tell."""
    before = float(np.mean([trial.champion >= thresholds.champion for trial in trials]))
    after = float(np.mean([trial.challenger >= thresholds.challenger for trial in trials]))
    promote = after < before
    alarms = f"false alarms on {len(trials)} confirmed normals {before:.0%} -> {after:.0%}, no confirmed defects"
    reason = f"fewer {alarms}" if promote else f"not fewer {alarms}"
    return Decision(promote, reason, 0.5, 0, len(trials), dropped=_dropped(trials, thresholds))


def _judged(
    before: Figures, after: Figures, probability: float, ranks_as_well: float, quiet: Quiet
) -> tuple[bool, str]:
    ranks = f"image AUROC {before.auroc:.3f} -> {after.auroc:.3f}"
    margin = f"mean score of confirmed defects {before.margin:.3f} -> {after.margin:.3f}"
    if after.margin <= before.margin:
        return False, f"not better: {margin}, {ranks}"
    if probability < CONFIDENCE:
        return False, f"perhaps chance: {margin}, higher in {probability:.0%} of the resamples, {CONFIDENCE:.0%} needed"
    if ranks_as_well < WORSE:
        return False, f"ranks worse: {ranks} on confirmed images"
    if after.recall < before.recall:
        return False, f"finds fewer defects: {before.recall:.0%} -> {after.recall:.0%} of the confirmed ones"
    if after.false_positive_rate > before.false_positive_rate + FALSE_ALARMS and not (
        after.false_positive_rate <= MOST_ALARMS and quiet.apart >= CONFIDENCE and quiet.recall >= before.recall
    ):
        alarms = f"{before.false_positive_rate:.0%} -> {after.false_positive_rate:.0%} of the confirmed normals"
        return False, f"raises more false alarms: {alarms}"
    return True, f"better: {margin}, {ranks}"


def _figures(labels: NDArray[np.bool_], scores: NDArray[np.float64], threshold: float) -> Figures:
    alarms = scores >= threshold
    wins = _wins(labels, scores)
    return Figures(
        auroc=float(wins.mean()),
        margin=float(scores[labels].mean()),
        recall=float(alarms[labels].mean()),
        false_positive_rate=float(alarms[~labels].mean()),
    )


def _recall_at(scores: NDArray[np.float64], labels: NDArray[np.bool_], rate: float) -> float:
    """Return the share of the defects above all normals but the highest `rate` of them."""
    normals = np.sort(scores[~labels])[::-1]
    allowed = round(rate * len(normals))
    return float((scores[labels] > normals[allowed]).mean()) if allowed < len(normals) else 1.0


def _wins(labels: NDArray[np.bool_], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (defects, normals): 1 where the defect scores higher, one half on a tie."""
    above = scores[labels][:, None] - scores[~labels][None, :]
    return np.asarray((np.sign(above) + 1) / 2, np.float64)


def _agreement(gain: NDArray[np.float64], random: np.random.Generator) -> float:
    """Return the share of random weightings of rows and columns in which `gain` is above 0, or 0 counted half."""
    rows = random.dirichlet(np.ones(gain.shape[0]), RESAMPLES)
    columns = random.dirichlet(np.ones(gain.shape[1]), RESAMPLES)
    gains = np.einsum("rd,dn,rn->r", rows, gain, columns, optimize=True)
    return float((gains > 1e-12).mean() + 0.5 * (np.abs(gains) <= 1e-12).mean())


def _dropped(trials: Sequence[Trial], thresholds: Thresholds) -> tuple[int, ...]:
    """Return the tasks that the champion has on the right side of its threshold and the challenger has not."""
    return tuple(
        trial.task
        for trial in trials
        if trial.anomaly == (trial.champion >= thresholds.champion)
        and trial.anomaly != (trial.challenger >= thresholds.challenger)
    )
