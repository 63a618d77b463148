"""A challenger is promoted only when the confirmed images say that it is better."""

from __future__ import annotations

import numpy as np
import pytest

from anomaly_workers.refine.gate import Thresholds, Trial, decide


def trials(defects: tuple[list[float], list[float]], normals: tuple[list[float], list[float]]) -> list[Trial]:
    """Build trials of (champion's, challenger's) scores of defects and of normals."""
    pairs = [(True, *pair) for pair in zip(*defects, strict=True)]
    pairs += [(False, *pair) for pair in zip(*normals, strict=True)]
    return [Trial(task, *pair) for task, pair in enumerate(pairs)]


def drawn(random: np.random.Generator, count: int, centre: float, *, spread: float = 0.1) -> list[float]:
    return np.clip(random.normal(centre, spread, count), 0.01, 0.99).tolist()


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def test_a_clearly_better_challenger_is_promoted(random: np.random.Generator) -> None:
    normals = drawn(random, 40, 0.3)
    decision = decide(trials((drawn(random, 10, 0.45), drawn(random, 10, 0.85)), (normals, normals)))
    assert decision.promote
    assert decision.champion is not None
    assert decision.challenger is not None
    assert decision.challenger.auroc > decision.champion.auroc
    assert "better" in decision.reason


def test_the_same_scores_are_not_better(random: np.random.Generator) -> None:
    defects, normals = drawn(random, 10, 0.6), drawn(random, 40, 0.3)
    decision = decide(trials((defects, defects), (normals, normals)))
    assert not decision.promote
    assert decision.dropped == ()


def test_one_verdict_decides_nothing() -> None:
    decision = decide(trials(([0.4], [0.9]), ([], [])))
    assert not decision.promote
    assert "needs 3" in decision.reason


@pytest.mark.parametrize("better", [True, False])
def test_with_normals_alone_only_fewer_false_alarms_count(better: bool) -> None:
    before, after = [0.6, 0.6, 0.3, 0.2], [0.4, 0.4, 0.3, 0.2]
    pair = (before, after) if better else (after, before)
    assert decide(trials(([], []), pair)).promote is better


def test_with_defects_alone_nothing_is_promoted() -> None:
    assert not decide(trials(([0.4] * 9, [0.9] * 9), ([], []))).promote


def test_a_class_that_is_unlearnt_is_not_paid_with_another(random: np.random.Generator) -> None:
    normals = drawn(random, 60, 0.2, spread=0.05)
    found, missed = drawn(random, 6, 0.8, spread=0.02), drawn(random, 4, 0.3, spread=0.02)
    unlearnt, learnt = drawn(random, 6, 0.45, spread=0.02), drawn(random, 4, 0.9, spread=0.02)
    decision = decide(trials(([*found, *missed], [*unlearnt, *learnt]), (normals, normals)))
    assert not decision.promote
    assert decision.dropped == tuple(range(6)), "each lost image is on the card"
    assert not decision.promote


def test_defects_are_not_paid_with_false_alarms(random: np.random.Generator) -> None:
    champion, challenger = drawn(random, 50, 0.3, spread=0.03), drawn(random, 50, 0.52, spread=0.03)
    decision = decide(trials((drawn(random, 10, 0.4), drawn(random, 10, 0.9)), (champion, challenger)))
    assert not decision.promote
    assert "false alarms" in decision.reason


def test_hard_normals_do_not_keep_back_what_learnt_from_fewer_hidden_defects() -> None:
    """Scores from a review of ball_screw: the champion had learnt from defects nobody had found yet."""
    defects = (
        [0.74, 0.72, 0.72, 0.71, 0.69, 0.69, 0.69, 0.49, 0.51, 0.57, 0.67, 0.53, 0.53, 0.44, 0.65],
        [0.78, 0.85, 0.85, 0.88, 0.89, 0.85, 0.84, 0.59, 0.72, 0.77, 0.87, 0.79, 0.87, 0.45, 0.81],
    )
    normals = (
        [0.32, 0.25, 0.49, 0.34, 0.34, 0.26, 0.46, 0.46, 0.43, 0.26],
        [0.31, 0.25, 0.63, 0.29, 0.37, 0.25, 0.43, 0.56, 0.54, 0.27],
    )
    assert decide(trials(defects, normals)).promote


def test_more_alarms_everywhere_are_no_progress(random: np.random.Generator) -> None:
    defects, normals = np.array(drawn(random, 10, 0.45, spread=0.05)), np.array(drawn(random, 20, 0.42, spread=0.05))
    shifted = trials((defects.tolist(), (defects + 0.05).tolist()), (normals.tolist(), (normals + 0.05).tolist()))
    decision = decide(shifted)
    assert not decision.promote
    assert "false alarms" in decision.reason


def test_flipped_verdicts_promote_no_worse_challenger() -> None:
    """Three of ten verdicts are wrong, and the challenger is no better than the champion: hardly ever promoted."""
    promoted = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        labels = np.array([True] * 5 + [False] * 5)
        truth = np.where(labels, 0.6, 0.3)
        labels[random.choice(10, 3, replace=False)] ^= True
        champion = np.clip(truth + random.normal(0, 0.1, 10), 0, 1)
        challenger = np.clip(truth + random.normal(0, 0.2, 10), 0, 1)
        rows = [
            Trial(task, bool(label), float(a), float(b))
            for task, (label, a, b) in enumerate(zip(labels, champion, challenger, strict=True))
        ]
        promoted += decide(rows).promote
    assert promoted <= 25


def test_higher_scores_do_not_pay_for_what_probably_ranks_worse() -> None:
    """Eight of ten defects rise above every normal; two sink among them, and image AUROC falls by more than .01."""
    normals = np.linspace(0.1, 0.45, 40).tolist()
    decision = decide(trials(([0.43] * 10, [0.7] * 8 + [0.25] * 2), (normals, normals)))
    assert not decision.promote
    assert "ranks worse" in decision.reason


def test_the_answer_does_not_depend_on_the_order(random: np.random.Generator) -> None:
    rows = trials((drawn(random, 8, 0.5), drawn(random, 8, 0.6)), (drawn(random, 20, 0.3), drawn(random, 20, 0.3)))
    assert decide(rows).probability == pytest.approx(decide(rows[::-1]).probability, abs=0.05)


def test_each_of_the_two_is_judged_at_its_own_threshold(random: np.random.Generator) -> None:
    normals = drawn(random, 40, 0.3, spread=0.02)
    rows = trials(([0.55, 0.6, 0.65, 0.7], [0.65, 0.7, 0.75, 0.8]), (normals, normals))

    both = decide(rows, thresholds=Thresholds(0.5, 0.5))
    assert both.challenger is not None
    assert both.challenger.recall == 1

    strict = decide(rows, thresholds=Thresholds(0.5, 0.72))
    assert strict.challenger is not None
    assert (strict.champion.recall, strict.challenger.recall) == (1, 0.5)  # type: ignore[union-attr]
    assert not strict.promote
    assert strict.dropped == (0, 1)


def test_false_alarms_are_counted_at_the_threshold_in_use() -> None:
    rows = trials(([], []), ([0.65, 0.65, 0.3, 0.2], [0.55, 0.55, 0.3, 0.2]))

    assert not decide(rows).promote, "two alarms before and after"
    assert decide(rows, thresholds=Thresholds(0.6, 0.6)).promote
    assert not decide(rows, thresholds=Thresholds(0.7, 0.7)).promote
