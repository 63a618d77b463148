"""The arithmetic of the pages: no file, no clock, no markup."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from anomaly_workers.calibration import THRESHOLD
from anomaly_workers.pages.facts import Review, Scored, Snapshot
from anomaly_workers.types import JSON

BINS = 50
"""Bars of the histogram over [0, 1]: the usual threshold of one half lies between two of them."""

ENOUGH_NORMALS = 100
"""Normals from which their 99 % score is counted; from fewer it is the one that the fit extrapolated."""

CHANCE = 0.01
"""A day stands out whose share of high scores is less likely than this, going by the days before it."""

DAY = 86_400

ENOUGH_BEFORE = 30
"""Images that must have come before a day can stand out."""

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The scores that a threshold can be judged by, each sorted.

    Attributes:
        normals: of normal images by a model that did not see them: those of the fit, or those confirmed.
        held_out: whether the normals are those of the fit.
        defects: of confirmed defects, before their verdict was learnt from.
        good: of images confirmed as normal, likewise.
        open: of the tasks that nobody reviewed.
        unknown: how many reviewed images have no score.
    """

    normals: tuple[float, ...]
    held_out: bool
    defects: tuple[float, ...]
    good: tuple[float, ...]
    open: tuple[float, ...]
    unknown: int

    @property
    def negatives(self) -> tuple[float, ...]:
        """What defects are ranked against: the images confirmed as normal, without any the normals of the fit."""
        return self.good or self.normals


@dataclass(frozen=True, slots=True)
class Operating:
    """What one threshold implies; None where there is nothing to count."""

    threshold: float
    false_positive_rate: float | None
    recall: float | None
    precision: float | None
    f1: float | None
    flagged: int
    open: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of each group in bins of equal width over [0, 1]; the last bin contains 1."""

    edges: tuple[float, ...]
    normals: tuple[int, ...]
    defects: tuple[int, ...]
    open: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve over all thresholds, highest first.

    Attributes:
        x, y: false-positive rate and recall, or recall and precision.
        thresholds: a score at or above which an image is flagged at that point; above 1 means none.
        area: under the curve; of precision over recall the average precision.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]
    thresholds: tuple[float, ...]
    area: float


@dataclass(frozen=True, slots=True)
class Found:
    """Defects found by reviews, in the order in which people reviewed.

    Attributes:
        defects: defects known after 1, 2, ... reviews.
        tasks: how many tasks there are to review.
        rate: of the defects known now, how many a review in random order would have found.
    """

    defects: tuple[int, ...]
    tasks: int
    rate: float


@dataclass(frozen=True, slots=True)
class Day:
    """The new images of one day.

    Attributes:
        day: ISO date, UTC.
        images: how many came.
        high: how many of them score above the limit.
        unusual: whether there are so many that the days before make it unlikely.
    """

    day: str
    images: int
    high: int
    unusual: bool

    @property
    def share(self) -> float:
        """Of the day's images, how many score above the limit."""
        return self.high / self.images


@dataclass(frozen=True, slots=True)
class Drift:
    """New images against the normals of the fit.

    Attributes:
        days: oldest first; days without new images are left out.
        limit: the score above which an image counts as high.
        expected: the share of normal images above it.
        counted: whether the limit is the normals' own quantile; the fit extrapolated it otherwise.
    """

    days: tuple[Day, ...]
    limit: float
    expected: float
    counted: bool


# -- what is known


def threshold_of(snapshot: Snapshot) -> float:
    """Return the operating point in force."""
    return float(snapshot.card.get("threshold", 0.5))


def evidence(snapshot: Snapshot) -> Evidence:
    """Return the scores that a threshold can be judged by."""
    scores = _unbiased(snapshot)
    said = {review.task: review.anomaly for review in snapshot.reviews}
    good = sorted(score for task, score in scores.items() if score is not None and said[task] is False)
    normals = sorted(_numbers(snapshot.card.get("normals")))
    return Evidence(
        normals=tuple(normals or good),
        held_out=bool(normals),
        defects=tuple(sorted(score for task, score in scores.items() if score is not None and said[task])),
        good=tuple(good),
        open=tuple(sorted(one.score for one in snapshot.open)),
        unknown=sum(score is None and said[task] is not None for task, score in scores.items()),
    )


def operating(given: Evidence, threshold: float) -> Operating:
    """Return what a threshold implies."""
    recall, alarms = _share(given.defects, threshold), _share(given.negatives, threshold)
    hits = sum(score >= threshold for score in given.defects)
    false = sum(score >= threshold for score in given.negatives)
    known = recall is not None and alarms is not None
    return Operating(
        threshold=threshold,
        false_positive_rate=_share(given.normals, threshold),
        recall=recall,
        precision=hits / (hits + false) if known and hits + false else None,
        f1=2 * hits / (hits + false + len(given.defects)) if known else None,
        flagged=sum(score >= threshold for score in given.open),
        open=len(given.open),
    )


def histogram(given: Evidence) -> Histogram:
    """Count each group's scores."""
    edges = np.linspace(0.0, 1.0, BINS + 1)
    groups = (given.normals, given.defects, given.open)
    counts = [tuple(int(count) for count in np.histogram(np.array(group), edges)[0]) for group in groups]
    return Histogram(tuple(float(round(edge, 4)) for edge in edges), *counts)


# -- curves


def roc(labels: Flags, scores: Floats) -> Curve | None:
    """Return the ROC curve, without points on a straight line; None where only one kind is present."""
    if not _both(labels):
        return None
    hits, flagged, cuts = _swept(labels, scores)
    x = np.append(0.0, (flagged - hits) / (~labels).sum())
    y = np.append(0.0, hits / labels.sum())
    area = float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())
    kept = _corners(x, y)
    return Curve(_plain(x[kept]), _plain(y[kept]), _plain(np.append(2.0, cuts)[kept]), area)


def precision_recall(labels: Flags, scores: Floats) -> Curve | None:
    """Return precision over recall with its average precision; None where only one kind is present."""
    if not _both(labels):
        return None
    hits, flagged, cuts = _swept(labels, scores)
    recall, precision = hits / labels.sum(), hits / flagged
    area = float((np.diff(recall, prepend=0.0) * precision).sum())
    return Curve(_plain(recall), _plain(precision), _plain(cuts), area)


def labelled(given: Evidence) -> tuple[Flags, Floats]:
    """Return (n,) labels, True for defects, and (n,) scores."""
    positives, negatives = given.defects, given.negatives
    labels = np.arange(len(positives) + len(negatives)) < len(positives)
    return labels, np.array([*positives, *negatives], np.float64)


# -- over time


def found(reviews: Sequence[Review], tasks: int) -> Found:
    """Count defects in the order of the reviews; ties and images without a verdict count as reviews."""
    defects = np.cumsum([bool(review.anomaly) for review in reviews], dtype=int)
    total = int(defects[-1]) if len(defects) else 0
    return Found(tuple(int(count) for count in defects), tasks, total / max(tasks, 1))


def drift(snapshot: Snapshot) -> Drift:
    """Return the share of new images that score above nearly all normals, by the day they were first scored.

    New is what the version was not fitted on: a bank knows its own images too well. Those of them with a score by what
    was learnt from the others count with that. Where odd images were left out, the normals lack their highest scores
    and the threshold stands in.
    """
    card = snapshot.card
    normals = sorted(_numbers(card.get("normals")))
    counted = len(normals) >= ENOUGH_NORMALS and not card.get("left_out")
    limit = float(np.quantile(normals, 0.99)) if counted else THRESHOLD  # where the rate below belongs to
    expected = 0.01 if counted else float(card.get("target_fpr", snapshot.target_fpr))
    by_day: dict[int, list[float]] = {}
    for when, score in _arrivals(snapshot):
        by_day.setdefault(int(when // DAY), []).append(score)
    days: list[Day] = []
    for number, scores in sorted(by_day.items()):
        day, high = datetime.fromtimestamp(number * DAY, UTC).date().isoformat(), sum(score > limit for score in scores)
        days.append(Day(day, len(scores), high, _stands_out(high, len(scores), days, expected)))
    return Drift(tuple(days), limit, expected, counted)


# -- which images to show


def highest(given: Iterable[Scored], most: int) -> list[Scored]:
    """Return the tasks with the highest scores."""
    return sorted(given, key=lambda one: (-one.score, one.task))[:most]


def least_certain(given: Iterable[Scored], most: int) -> list[Scored]:
    """Return the tasks whose score is nearest to the threshold."""
    return sorted(given, key=lambda one: (abs(one.score - one.threshold), one.task))[:most]


def ranks(given: Sequence[Scored]) -> dict[int, tuple[float, float]]:
    """Return the ranks that (bank, head) give each task that both scored, from 0 for the highest to 1."""
    both = [(one.task, one.parts) for one in given if one.parts is not None]
    if len(both) < 2:
        return {}
    bank, head = (1 - _percentiles(np.array([parts[place] for _, parts in both])) for place in (0, 1))
    return {task: (float(b), float(h)) for (task, _), b, h in zip(both, bank, head, strict=True)}


def disagreement(ranked: Mapping[int, tuple[float, float]]) -> dict[int, float]:
    """Return how far bank and head are apart in the rank's logarithm: where both find all normal, ranks are noise."""
    return {task: abs(math.log(bank / head)) for task, (bank, head) in ranked.items()}


# -- helpers


def as_floats(card: JSON, name: str) -> dict[int, float]:
    """Return a card's scores by task, empty if it has none."""
    stored = card.get(name)
    return {int(task): float(score) for task, score in stored.items()} if isinstance(stored, Mapping) else {}


def _unbiased(snapshot: Snapshot) -> dict[int, float | None]:
    """The scores that the deployed version gave the reviewed images before it learnt what they show, if it is known.

    A rejected alarm is calm at once, and a defect that was learnt from is found more easily: the scores of today
    would praise the version for what it was told.
    """
    held_out = as_floats(snapshot.card, "held_out")

    def score(review: Review) -> float | None:
        if review.task in held_out:
            return held_out[review.task]
        if review.score is not None and review.version in snapshot.family:
            return review.score
        record = snapshot.record(review.task)
        return record.score if record else None  # another version's score would be on another scale

    return {review.task: score(review) for review in snapshot.reviews}


def _arrivals(snapshot: Snapshot) -> Iterable[tuple[float, float]]:
    fitted = frozenset(int(task) for task in snapshot.card.get("tasks", ()))
    held_out = as_floats(snapshot.card, "normals") | as_floats(snapshot.card, "held_out")
    before = _unbiased(snapshot)
    for one in snapshot.scored:
        score = held_out.get(one.task)
        if score is None and one.task not in fitted:
            score = before.get(one.task, one.score)
        if score is not None:
            yield one.first_at, score


def _numbers(stored: object) -> list[float]:
    values = stored.values() if isinstance(stored, Mapping) else stored
    return [float(value) for value in values] if isinstance(values, Iterable) else []


def _share(scores: Sequence[float], threshold: float) -> float | None:
    return sum(score >= threshold for score in scores) / len(scores) if scores else None


def _swept(labels: Flags, scores: Floats) -> tuple[Floats, Floats, Floats]:
    """Hits and flagged images at each distinct score, highest first, (k,) each."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=np.nan) != 0)
    hits = np.cumsum(labels[order])[ends].astype(np.float64)
    return hits, (ends + 1).astype(np.float64), scores[order][ends]


def _corners(x: Floats, y: Floats) -> Flags:
    """Where a curve changes direction, and its ends."""
    straight = np.diff(x)[:-1] * np.diff(y)[1:] == np.diff(x)[1:] * np.diff(y)[:-1]
    return np.concatenate([[True], ~straight, [True]])


def _percentiles(values: Floats) -> Floats:
    """The share of values below each, counting half of its equals, (n,)."""
    ordered = np.sort(values)
    sides = np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    return np.asarray(sides / (2 * len(values)), np.float64)


def _stands_out(high: int, images: int, before: Sequence[Day], expected: float) -> bool:
    """Whether a day has more high scores than its predecessors let one expect; defects come every day."""
    known = sum(day.images for day in before)
    usual = sum(day.high for day in before) / known if known else 1.0
    return known >= ENOUGH_BEFORE and usual < 1 and _tail(high, images, max(usual, expected)) < CHANCE


def _tail(at_least: int, of: int, share: float) -> float:
    """The chance of `at_least` or more among `of` where each is one with probability `share`."""
    terms = (
        math.lgamma(of + 1)
        - math.lgamma(count + 1)
        - math.lgamma(of - count + 1)
        + count * math.log(share)
        + (of - count) * math.log1p(-share)
        for count in range(at_least)
    )
    return max(0.0, 1.0 - sum(math.exp(term) for term in terms))


def _both(labels: Flags) -> bool:
    return bool(labels.any() and not labels.all())


def _plain(values: Floats) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values)
