"""Calibrated scores: order, operating point, tail."""

from __future__ import annotations

import numpy as np
import pytest

from anomaly_workers.calibration import (
    THRESHOLD,
    Calibration,
    calibrate,
    gumbel_body,
    gumbel_fit,
    gumbel_quantile,
    tail_limit,
    threshold_at,
)


def gumbel(count: int, *, location: float, scale: float, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.random.default_rng(seed).gumbel(location, scale, count)


def test_the_limit_is_one_half_and_the_typical_image_one_quarter() -> None:
    calibration = Calibration(limit=10.0, unit=4.0)

    scores = calibration(np.array([6.0, 10.0, 14.0], np.float32))

    assert scores.tolist() == [0.25, THRESHOLD, 0.75]
    assert calibration.score(10.0) == THRESHOLD


def test_scores_stay_in_range_and_strictly_ordered_far_out() -> None:
    calibration = Calibration(limit=3.0, unit=0.2)
    raw = np.concatenate([np.linspace(0, 10, 500), np.geomspace(10.1, 1000, 100)])

    scores = np.array([calibration.score(float(value)) for value in raw])

    assert (np.diff(scores) > 0).all()
    assert scores.min() >= 0
    assert scores.max() < 1
    assert (np.diff(calibration(raw.astype(np.float32))) > 0).all()


def test_l_moments_recover_a_gumbel_law() -> None:
    location, scale = gumbel_fit(gumbel(50_000, location=5, scale=0.5))

    assert location == pytest.approx(5, abs=0.02)
    assert scale == pytest.approx(0.5, abs=0.02)


def test_two_scores_give_half_their_difference_over_log_two() -> None:
    _, scale = gumbel_fit(np.array([1.0, 2.0]))

    assert scale == pytest.approx(0.5 / np.log(2))


@pytest.mark.parametrize("target", [0.01, 0.05])
def test_threshold_meets_its_false_positive_rate(target: float) -> None:
    calibration = calibrate(gumbel(500, location=20, scale=2).tolist(), target_fpr=target)

    unseen = gumbel(100_000, location=20, scale=2, seed=1)

    assert (unseen >= calibration.limit).mean() == pytest.approx(target, rel=0.5)


def test_forty_normals_extrapolate_beyond_their_highest() -> None:
    rates = []
    for seed in range(30):
        calibration = calibrate(gumbel(40, location=20, scale=1.6, seed=seed).tolist(), target_fpr=0.01)
        rates.append(1 - np.exp(-np.exp(-(calibration.limit - 20) / 1.6)))

    assert 0.002 < np.mean(rates) < 0.02


@pytest.mark.parametrize("scores", [[3.0], [3.0, 3.0], [0.0, 0.0, 0.0]])
def test_scores_without_spread_still_leave_a_margin(scores: list[float]) -> None:
    calibration = calibrate(scores, target_fpr=0.01)

    assert calibration.limit > scores[0]
    assert calibration.unit > 0


def test_what_was_left_out_is_missed_by_the_middle_of_the_scores_only_a_little() -> None:
    scores = np.sort(gumbel(20_000, location=10, scale=0.5))
    normals = scores[:16_000]

    location, scale = gumbel_body(normals, 4_000)

    assert (location, scale) == (pytest.approx(10, abs=0.02), pytest.approx(0.5, rel=0.03))
    limit = tail_limit(normals.tolist(), target_fpr=0.01, left_out=4_000)
    assert np.mean(scores >= limit) == pytest.approx(0.01, abs=0.003)
    assert np.mean(scores >= tail_limit(normals.tolist(), target_fpr=0.01)) > 0.04


def test_defects_left_out_instead_of_normals_move_the_limit_little() -> None:
    normals = gumbel(200, location=10, scale=0.5).tolist()

    limit = tail_limit(normals, target_fpr=0.01, left_out=50)

    assert 10 + 0.5 * gumbel_quantile(0.98) < limit < 10 + 0.5 * gumbel_quantile(0.9999)


@pytest.mark.parametrize("count", [2, 3, 4, 8])
def test_few_scores_with_some_left_out_still_have_a_limit(count: int) -> None:
    calibration = calibrate(np.linspace(5, 6, count).tolist(), target_fpr=0.01, left_out=1)

    assert calibration.limit > 6
    assert calibration.unit > 0


def test_a_score_leads_back_to_its_raw_score() -> None:
    calibration = Calibration(limit=3.0, unit=0.2)

    for raw in (0.0, 2.9, 3.0, 3.1, 50.0):
        assert calibration.raw(calibration.score(raw)) == pytest.approx(raw, rel=1e-6, abs=1e-6)
    assert np.isfinite(calibration.raw(1.0))


def test_the_calibrated_rate_is_one_half_again() -> None:
    raw = gumbel(100, location=20, scale=2).tolist()
    calibration = calibrate(raw, target_fpr=0.01)
    kept = [round(calibration.score(one), 6) for one in raw]

    assert threshold_at(kept, calibration, target_fpr=0.01) == pytest.approx(THRESHOLD, abs=1e-4)
    assert threshold_at(kept, calibration, target_fpr=0.1) < THRESHOLD
