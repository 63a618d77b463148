"""A newly fitted version obeys the project's rule for the threshold, and the gate compares at the thresholds in use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from anomaly_workers import detectors, learning, policy
from anomaly_workers.detectors.base import Options
from anomaly_workers.detectors.patchwise import PatchwiseDetector
from anomaly_workers.feedback import Example
from anomaly_workers.learning import Candidate, Confirmed
from anomaly_workers.runtime import Session
from anomaly_workers.settings import Settings, load_settings
from anomaly_workers.store import ProjectStore, Store
from anomaly_workers.types import Picture, no_progress


class Runtime:
    """The part of a runtime that choosing a threshold and a version needs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def published(self, _project: int, _version: str) -> Any:
        return cast(Any, type("Champion", (), {"predict": staticmethod(lambda pictures: [])}))


@pytest.fixture(scope="module")
def detector() -> PatchwiseDetector:
    random = np.random.default_rng(0)
    pictures = [Picture(random.integers(90, 160, (32, 32, 3), dtype=np.uint8), size=(32, 32)) for _ in range(8)]
    found = cast(PatchwiseDetector, detectors.create(Options(detector="patchcore", image_size=32)))
    found.fit(pictures, confirmed=[True] * len(pictures))
    return found


@pytest.fixture
def store(tmp_path: Path) -> ProjectStore:
    return Store(tmp_path).project(3)


def session(store: ProjectStore) -> Session:
    nothing: Any = None
    return Session(store, nothing, nothing, nothing, nothing)


def confirmed(scores: dict[int, float], *, defects: set[int]) -> list[Confirmed]:
    picture = Picture(np.zeros((2, 2, 3), np.uint8), size=(2, 2))
    return [
        Confirmed(Example(task, "", task in defects, None, None, 1, (task,), (), "", None, ""), picture)
        for task in scores
    ]


def test_a_fit_puts_the_threshold_where_the_policy_wants_it(
    detector: PatchwiseDetector, store: ProjectStore, tmp_path: Path
) -> None:
    runtime: Any = Runtime(load_settings({}, data_dir=tmp_path))
    scores = {1: 0.3, 2: 0.4, 3: 0.8}
    known, candidate = confirmed(scores, defects={3}), Candidate(detector, scores, "bank")

    policy.change(store, {"rule": "f1", "value": 0.0})
    found = learning._with_threshold(runtime, session(store), candidate, known)
    assert (found.rule, found.detector.threshold) == ("f1", pytest.approx(0.6))
    detector.save(tmp_path)
    assert json.loads((tmp_path / "detector.json").read_text())["threshold"] == pytest.approx(0.6)

    policy.change(store, {"rule": "fpr", "value": 0.2})
    assert learning._with_threshold(runtime, session(store), candidate, known).detector.threshold < 0.5

    policy.change(store, {"rule": "f1", "value": 0.0})
    fallback = learning._with_threshold(runtime, session(store), Candidate(detector, {}, "bank"), [])
    assert (fallback.rule, fallback.detector.threshold) == ("fpr", 0.5), "nothing is confirmed"


def test_the_gate_compares_at_the_deployed_versions_threshold_and_the_new_ones(
    detector: PatchwiseDetector, store: ProjectStore, tmp_path: Path
) -> None:
    held_out = {1: 0.65, 2: 0.65, 3: 0.3, 4: 0.2}
    card = {"detector": "patchcore", "threshold": 0.6, "held_out": {str(task): one for task, one in held_out.items()}}
    with store.new_version() as scratch:
        store.roll_out(store.publish(scratch, card))
    policy.change(store, {"rule": "number", "value": 0.6})
    runtime: Any = Runtime(load_settings({}, data_dir=tmp_path))
    scores = {1: 0.55, 2: 0.55, 3: 0.3, 4: 0.2}
    known = confirmed(scores, defects=set())
    candidate = learning._with_threshold(runtime, session(store), Candidate(detector, scores, "bank"), known)

    _, decision = learning._choose(runtime, session(store), [candidate], known)

    assert decision is not None
    assert decision.promote, "0.55 is an alarm at one half alone"
    assert "50% -> 0%" in decision.reason


def test_a_fit_does_not_undo_what_somebody_deployed_meanwhile(store: ProjectStore) -> None:
    def publish(**card: Any) -> str:
        with store.new_version() as scratch:
            (scratch / "detector.safetensors").write_text(str(card))
            return store.publish(scratch, {"detector": "patchcore", **card})

    first, other = publish(images=1), publish(images=2)
    moved = publish(images=1, weights_of=first)
    assert not learning.overtaken(store, "")
    store.deploy(first, reason="first version")
    assert not learning.overtaken(store, first)
    store.deploy(moved, reason="its threshold was moved")
    assert not learning.overtaken(store, first)

    store.roll_out(other)
    assert learning.overtaken(store, first)
    store.deploy(other, reason="by hand")
    assert learning.overtaken(store, first)


@pytest.mark.parametrize(("weight", "kinds"), [(1.0, ["bank and head", "bank"]), (0.0, ["bank"])])
def test_without_a_weight_confirmed_defects_make_no_head(weight: float, kinds: list[str]) -> None:
    random = np.random.default_rng(1)
    pictures = [Picture(random.integers(90, 160, (32, 32, 3), dtype=np.uint8), size=(32, 32)) for _ in range(8)]
    dark = Picture(pictures[0].pixels // 3, size=(32, 32))
    defect = Confirmed(Example(99, "", True, None, None, 1, (99,), (), "", None, ""), dark)
    material = learning.Material(8, range(8), pictures, [True] * 8, [defect])
    fresh = cast(PatchwiseDetector, detectors.create(Options(detector="patchcore", image_size=32)))
    found = learning._candidates(fresh, material, no_progress, weight=weight)
    assert [one.kind for one in found] == kinds
    assert all(set(one.scores) == {99} for one in found)
