"""The operating point: where a project's policy puts a version's threshold."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anomaly_workers import policy
from anomaly_workers.calibration import THRESHOLD, Calibration, threshold_at
from anomaly_workers.errors import ConfigError, StoreError
from anomaly_workers.feedback import Entry, FeedbackLog, verdict
from anomaly_workers.policy import Policy, Rule
from anomaly_workers.settings import Settings
from anomaly_workers.store import ProjectStore

NEAR = 1e-6
"""Thresholds that are no farther apart are the same."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """A version's scores of images that it had not learnt from.

    Attributes:
        scale: from raw scores to scores in [0, 1].
        rate: the false-positive rate that the scale puts at one half.
        normals: scores of the images it was fitted on, each by what was learnt from the others; empty if unknown.
        judged: by task the score of each confirmed image and whether it is an anomaly.
        left_out: how many images were too odd to be among the normals.
    """

    scale: Calibration
    rate: float
    normals: Sequence[float] = ()
    judged: Mapping[int, tuple[float, bool]] = field(default_factory=dict)
    left_out: int = 0

    @property
    def confirmed_normals(self) -> list[float]:
        """Scores of the confirmed normal images."""
        return [score for score, anomaly in self.judged.values() if not anomaly]

    @property
    def defects(self) -> list[float]:
        """Scores of the confirmed defects."""
        return [score for score, anomaly in self.judged.values() if anomaly]


def threshold_for(wanted: Policy, evidence: Evidence, settings: Settings) -> float:
    """Return where a policy puts a version's threshold.

    Raises:
        ConfigError: there is nothing yet that the rule could go by.
    """
    if (plain := _plain(wanted, evidence.rate, settings)) is not None:
        return plain
    if wanted.rule == "f1":
        return best_f1(evidence.confirmed_normals, evidence.defects)
    if not evidence.normals:
        raise ConfigError(
            f"This version knows its threshold for a false-positive rate of {evidence.rate:g} alone. Fit it again "
            "(Start training in Label Studio), or give the threshold itself: --at."
        )
    rate = wanted.value or settings.target_fpr
    return threshold_at(evidence.normals, evidence.scale, target_fpr=rate, left_out=evidence.left_out)


def settle(wanted: Policy, evidence: Evidence, settings: Settings) -> tuple[float, Rule, float]:
    """Return a new version's threshold with the rule it comes from; the default's where the wanted one cannot work."""
    try:
        return threshold_for(wanted, evidence, settings), wanted.rule, wanted.value
    except ConfigError:
        return THRESHOLD, "fpr", 0.0


def best_f1(normals: Sequence[float], defects: Sequence[float]) -> float:
    """Return the threshold with the highest F1; of several the middle of the widest range.

    Raises:
        ConfigError: one of the two kinds is missing.
    """
    if not normals or not defects:
        raise ConfigError(
            f"F1 needs confirmed images of both kinds, and there are {len(defects)} defects and {len(normals)} "
            "normals. Judge some in Label Studio first, or use --fpr or --at."
        )
    cuts = [0.0, *sorted({*normals, *defects})]
    ranges = list(zip(cuts, cuts[1:], strict=False))  # every threshold above the first up to the second flags the same
    values = [_f1(normals, defects, upper) for _, upper in ranges]
    best = [pair for pair, value in zip(ranges, values, strict=True) if value == max(values)]
    lower, upper = max(best, key=lambda pair: pair[1] - pair[0])
    return (lower + upper) / 2


def evidence(store: ProjectStore, version: str) -> Evidence:
    """Return what is known of a version.

    A confirmed image that the version was not trained on counts with the score its annotators saw.

    Raises:
        StoreError: there is no such version, or it is damaged.
    """
    card = store.card(version)
    held_out = {int(task): float(score) for task, score in card.get("held_out", {}).items()}
    judged = _judged(FeedbackLog(store).current().values(), held_out, store.family(version))
    rate = float(card.get("target_fpr") or 0.0)
    left_out = int(card.get("left_out", 0))
    return Evidence(_scale(store, version), rate, tuple(card.get("normals", ())), judged, left_out)


def wanted(store: ProjectStore, settings: Settings) -> float:
    """Return where the deployed version's threshold should be.

    Raises:
        ConfigError: there is nothing yet that the rule could go by.
    """
    chosen, rate = policy.read(store), float(store.card(store.current).get("target_fpr") or 0.0)
    plain = _plain(chosen, rate, settings)
    return threshold_for(chosen, evidence(store, store.current), settings) if plain is None else plain


def is_due(store: ProjectStore, settings: Settings) -> bool:
    """Tell whether the deployed version's threshold is not where the policy wants it, and can be moved.

    F1 is followed when somebody asks for it and when a version is fitted, not with every verdict.
    """
    if not store.current or store.rollout:
        return False
    card = store.card(store.current)
    if policy.read(store).rule == "f1" == card.get("rule"):
        return False
    try:
        return not is_near(wanted(store, settings), card)
    except ConfigError:
        return False


def is_near(threshold: float, card: Mapping[str, Any]) -> bool:
    """Tell whether a version has a threshold."""
    return abs(threshold - float(card.get("threshold", THRESHOLD))) < NEAR


def follow(store: ProjectStore, version: str) -> None:
    """Make a version's rule the project's: who deploys a version by hand wants it as it was, its threshold included."""
    card = store.card(version)
    policy.change(store, {"rule": card.get("rule", "fpr"), "value": card.get("value", 0.0)})


def _plain(wanted: Policy, rate: float, settings: Settings) -> float | None:
    """Return the threshold where nothing but the version's false-positive rate is needed to know it."""
    if wanted.rule == "number":
        return wanted.value
    if wanted.rule == "fpr" and abs((wanted.value or settings.target_fpr) - rate) < NEAR:
        return THRESHOLD
    return None


def _judged(
    entries: Iterable[Entry], held_out: Mapping[int, float], family: frozenset[str]
) -> dict[int, tuple[float, bool]]:
    by_task: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_task[entry.task].append(entry)
    found = {}
    for task, said in by_task.items():
        anomaly, score = verdict(said), held_out.get(task, _seen_score(said, family))
        if anomaly is not None and score is not None:
            found[task] = (score, anomaly)
    return found


def _seen_score(said: Iterable[Entry], family: frozenset[str]) -> float | None:
    """Return the score that the first annotator saw: later ones may have seen it calmed."""
    seen = sorted((entry.seq, entry.score) for entry in said if entry.version in family and entry.score is not None)
    return seen[0][1] if seen else None


def _f1(normals: Sequence[float], defects: Sequence[float], threshold: float) -> float:
    hits = sum(score >= threshold for score in defects)
    alarms = sum(score >= threshold for score in normals)
    return 2 * hits / (hits + alarms + len(defects))


def _scale(store: ProjectStore, version: str) -> Calibration:
    path = store.version_folder(version) / "detector.json"
    try:
        return Calibration(**json.loads(path.read_text())["calibration"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} cannot be read: {error}. Restore it from a backup or fit again.") from error
