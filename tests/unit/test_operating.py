"""Where a project's policy puts the threshold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from anomaly_workers import calm, operating, policy
from anomaly_workers.calibration import THRESHOLD, calibrate
from anomaly_workers.errors import ConfigError
from anomaly_workers.feedback import Entry, FeedbackLog
from anomaly_workers.operating import Evidence, best_f1, threshold_for
from anomaly_workers.policy import Policy
from anomaly_workers.settings import Settings, load_settings
from anomaly_workers.store import ProjectStore, Store

RAW = np.random.default_rng(0).gumbel(20, 2, 200).tolist()
SCALE = calibrate(RAW, target_fpr=0.01)
NORMALS = [round(SCALE.score(raw), 6) for raw in RAW]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({}, data_dir=tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> ProjectStore:
    return Store(tmp_path).project(3)


def published(store: ProjectStore, **card: Any) -> str:
    """Publish a version that was fitted on NORMALS."""
    full = {"detector": "patchcore", "kind": "bank", "threshold": 0.5, "target_fpr": 0.01, "normals": NORMALS} | card
    with store.new_version() as scratch:
        (scratch / "detector.safetensors").write_bytes(b"weights")
        (scratch / "detector.json").write_text(json.dumps({"calibration": asdict(SCALE)}))
        return store.publish(scratch, full)


def said(store: ProjectStore, entries: Sequence[tuple[int, bool, float, str]]) -> None:
    """Write a log of (task, anomaly, score, version)."""
    folder = store.folder / "feedback"
    folder.mkdir(parents=True, exist_ok=True)
    at = "2026-01-01T00:00:00Z"
    with (folder / "log.jsonl").open("w") as log:
        for seq, (task, anomaly, score, version) in enumerate(entries, 1):
            judged = "false alarm" if score >= 0.5 and not anomaly else "unknown"
            entry = Entry(seq, at, seq, task, "", "submitted", at, at, 1, anomaly, score=score, version=version)
            log.write(json.dumps(asdict(entry) | {"judged": judged}) + "\n")


def test_a_number_is_taken_as_it_is(settings: Settings) -> None:
    assert threshold_for(Policy(rule="number", value=0.63), Evidence(SCALE, 0.01), settings) == 0.63


def test_the_rate_a_version_was_fitted_for_is_one_half_even_without_scores(settings: Settings) -> None:
    assert threshold_for(Policy(), Evidence(SCALE, 0.01), settings) == THRESHOLD
    assert threshold_for(Policy(rule="fpr", value=0.01), Evidence(SCALE, 0.01), settings) == THRESHOLD


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.2, 0.4])
def test_another_rate_is_where_a_fit_for_it_would_have_put_it(settings: Settings, rate: float) -> None:
    found = threshold_for(Policy(rule="fpr", value=rate), Evidence(SCALE, 0.01, NORMALS), settings)

    assert found == pytest.approx(SCALE.score(calibrate(RAW, target_fpr=rate).limit), abs=1e-4)


def test_a_lower_rate_means_a_higher_threshold(settings: Settings) -> None:
    known = Evidence(SCALE, 0.01, NORMALS)
    rates = [0.3, 0.1, 0.03, 0.01, 0.003]
    found = [threshold_for(Policy(rule="fpr", value=rate), known, settings) for rate in rates]

    assert found == sorted(found)
    flagged = np.mean([score >= found[1] for score in NORMALS])
    assert flagged == pytest.approx(0.1, abs=0.05)


def test_an_old_card_without_scores_says_to_fit_again(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="Fit it again"):
        threshold_for(Policy(rule="fpr", value=0.2), Evidence(SCALE, 0.01), settings)


def test_f1_of_kinds_apart_is_halfway_between_them() -> None:
    assert best_f1([0.1, 0.3], [0.7, 0.9]) == pytest.approx(0.5)


def test_f1_of_mixed_kinds_is_the_best_cut() -> None:
    normals, defects = [0.1, 0.2, 0.3, 0.8], [0.25, 0.5, 0.6, 0.9]

    threshold = best_f1(normals, defects)

    def f1(at: float) -> float:
        hits, alarms = sum(one >= at for one in defects), sum(one >= at for one in normals)
        return 2 * hits / (hits + alarms + len(defects))

    assert f1(threshold) == max(f1(at) for at in np.linspace(0.001, 0.999, 999))


def test_f1_of_a_tie_takes_the_middle_of_the_widest_range() -> None:
    # Up to 0.2 both are found with two alarms, from 0.3 to 0.9 one of two without any: F1 is two thirds at both.
    assert best_f1([0.25, 0.3], [0.2, 0.9]) == pytest.approx(0.6)


@pytest.mark.parametrize(("normals", "defects"), [([], [0.5]), ([0.5], []), ([], [])])
def test_f1_needs_both_kinds(normals: list[float], defects: list[float]) -> None:
    with pytest.raises(ConfigError, match=f"{len(defects)} defects and {len(normals)} normals"):
        best_f1(normals, defects)


def test_confirmed_images_count_with_the_score_of_a_model_that_had_not_learnt_from_them(store: ProjectStore) -> None:
    version = published(store, held_out={"7": 0.42})
    said(store, [(7, True, 0.99, version), (8, False, 0.3, version), (9, True, 0.8, "another-v9"), (10, True, 0.7, "")])

    known = operating.evidence(store, version)

    assert dict(known.judged) == {7: (0.42, True), 8: (0.3, False)}


def test_annotators_who_disagree_say_nothing(store: ProjectStore) -> None:
    version = published(store)
    said(store, [(7, True, 0.6, version)])
    entry = FeedbackLog(store).entries()[0]
    line = asdict(entry) | {"seq": 2, "annotation": 2, "annotator": 2, "anomaly": False}
    with (store.folder / "feedback/log.jsonl").open("a") as log:
        log.write(json.dumps(line) + "\n")

    assert operating.evidence(store, version).judged == {}


def test_a_family_is_the_versions_of_the_same_weights(store: ProjectStore) -> None:
    first = published(store)
    second = published(store, kind="threshold", parent=first, weights_of=first)
    third = published(store, kind="threshold", parent=second, weights_of=first)
    other = published(store)

    assert store.family(first) == store.family(second) == store.family(third) == {first, second, third}
    assert store.family(other) == {other}


def test_a_rejection_counts_for_every_version_of_the_family(store: ProjectStore) -> None:
    first = published(store)
    second = published(store, kind="threshold", parent=first, weights_of=first)
    other = published(store)
    said(store, [(7, False, 0.6, first), (8, False, 0.7, second), (9, False, 0.7, other)])
    log = FeedbackLog(store)

    for version in (first, second):
        assert {one.task for one in calm.rejections(log, store.family(version)).values()} == {7, 8}
    assert {one.task for one in calm.rejections(log, store.family(other)).values()} == {9}


def test_a_move_is_due_until_the_deployed_version_has_the_threshold(store: ProjectStore, settings: Settings) -> None:
    assert not operating.is_due(store, settings)
    first = published(store)
    store.roll_out(first)
    assert not operating.is_due(store, settings)

    policy.change(store, {"rule": "number", "value": 0.7})
    assert operating.is_due(store, settings)
    second = published(store, threshold=0.7, rule="number", value=0.7)
    store.roll_out(second)
    assert not operating.is_due(store, settings), "a rollout comes first"
    store.deploy(second, reason="test")
    assert not operating.is_due(store, settings)


def test_f1_is_not_due_before_there_is_something_to_go_by(store: ProjectStore, settings: Settings) -> None:
    version = published(store)
    store.roll_out(version)
    policy.change(store, {"rule": "f1", "value": 0.0})
    assert not operating.is_due(store, settings)

    said(store, [(7, True, 0.9, version), (8, False, 0.3, version)])
    assert operating.is_due(store, settings)
    assert operating.wanted(store, settings) == pytest.approx(0.6)


def test_a_new_version_falls_back_to_the_default_rule(settings: Settings) -> None:
    known = Evidence(SCALE, 0.01, NORMALS)

    assert operating.settle(Policy(rule="f1"), known, settings) == (THRESHOLD, "fpr", 0.0)
    assert operating.settle(Policy(rule="number", value=0.7), known, settings) == (0.7, "number", 0.7)


def test_a_version_deployed_by_hand_brings_its_rule(store: ProjectStore, settings: Settings) -> None:
    first, second = published(store), published(store, threshold=0.7, rule="number", value=0.7)
    policy.change(store, {"rule": "number", "value": 0.7, "annotators": 2})

    operating.follow(store, first)
    assert policy.read(store) == Policy(rule="fpr", value=0.0, annotators=2)

    operating.follow(store, second)
    assert (policy.read(store).rule, policy.read(store).value) == ("number", 0.7)
