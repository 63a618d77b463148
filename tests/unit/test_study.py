"""The deviation head, on surfaces whose defects the bank alone hardly sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch

from anomaly_workers import detectors, metrics
from anomaly_workers.detectors.base import Options
from anomaly_workers.detectors.deviation import BELOW, Head, fused, together, views
from anomaly_workers.detectors.maps import raw_scores
from anomaly_workers.detectors.patchwise import PatchwiseDetector
from anomaly_workers.detectors.scales import Grids
from anomaly_workers.errors import Cancelled, ConfigError
from anomaly_workers.refine import gate
from anomaly_workers.refine.study import Lesson, Study, inside_cells, invent, study
from anomaly_workers.shots import trials
from anomaly_workers.types import Picture

SIDE = 96


def surface(seed: int, *, defect: bool = False) -> tuple[Picture, np.ndarray[tuple[int, int], np.dtype[np.bool_]]]:
    """A noisy surface with a harmless bright scratch; the defect is a faint dark one beside it."""
    random = np.random.default_rng(seed)
    grey = 128 + random.normal(0, 14, (SIDE, SIDE))
    grey[int(random.integers(10, 86)), 10:86] += 60
    mask = np.zeros((SIDE, SIDE), np.bool_)
    if defect:
        row, column = random.integers(20, 70, 2)
        mask[row : row + 10, column : column + 10] = True
        grey[mask] = 70 + random.normal(0, 6, mask.sum())
    pixels = np.clip(grey, 0, 255).astype(np.uint8)[..., None].repeat(3, -1)
    return Picture(pixels, size=(SIDE, SIDE)), mask


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def detector() -> PatchwiseDetector:
    made = cast("PatchwiseDetector", detectors.create(Options("patchcore", image_size=SIDE)))
    normals = [surface(seed)[0] for seed in range(24)]
    made.fit(normals, confirmed=[True] * len(normals))
    return made


@pytest.fixture(scope="module")
def normals(detector: PatchwiseDetector) -> list[Grids]:
    return detector.grids([surface(seed)[0] for seed in range(24)])


def lessons(detector: PatchwiseDetector, count: int, *, masks: bool) -> list[Lesson]:
    drawn = [surface(100 + seed, defect=True) for seed in range(count)]
    grids = detector.grids([picture for picture, _ in drawn])
    shape = grids[0].shape
    return [
        Lesson(grid, inside_cells(mask, shape) if masks else None) for grid, (_, mask) in zip(grids, drawn, strict=True)
    ]


def gap(study: Study) -> tuple[float, float]:
    """How many of the normals' deviations the held-out defects are above them, without the head and with it."""
    before = (study.lessons_before.mean() - study.normals_before.mean()) / study.normals_before.std()
    return float(before), float((study.lessons.mean() - study.normals.mean()) / study.normals.std())


@pytest.mark.parametrize("masks", [True, False])
def test_held_out_defects_stand_out_more_with_a_head(
    detector: PatchwiseDetector, normals: list[Grids], masks: bool
) -> None:
    taught = study(detector.memory, normals, lessons(detector, 8, masks=masks))
    before, after = gap(taught)
    assert after > before
    assert len(taught.normals) == len(taught.normals_before) == len(taught.normals_alone) == 24
    assert len(taught.lessons) == len(taught.lessons_before) == 8


def test_new_defects_score_higher_with_the_head_and_normals_do_not(
    detector: PatchwiseDetector, normals: list[Grids]
) -> None:
    taught = study(detector.memory, normals, lessons(detector, 8, masks=True))
    joined = detector.joined(taught.head, taught.normals.tolist())
    defects = [surface(500 + seed, defect=True)[0] for seed in range(6)]
    good = [surface(600 + seed)[0] for seed in range(6)]
    gain = np.mean([d.score for d in joined.predict(defects)]) - np.mean([d.score for d in detector.predict(defects)])
    change = np.mean([d.score for d in joined.predict(good)]) - np.mean([d.score for d in detector.predict(good)])
    assert gain > 0
    assert gain > change


def smoothed_away(seed: int) -> Picture:
    """A surface with a defect of a kind that no lesson shows: a spot without grain."""
    picture, _ = surface(seed)
    row, column = np.random.default_rng(seed).integers(20, 70, 2)
    pixels = picture.pixels.copy()
    spot = pixels[row : row + 9, column : column + 9]
    spot[:] = spot.mean()
    return Picture(pixels, picture.size)


def test_made_up_defects_help_with_a_kind_that_nobody_confirmed(
    detector: PatchwiseDetector, normals: list[Grids]
) -> None:
    """By the image AUROC of the head alone, which the bank's part would hide."""
    made = invent(detector.grids, [surface(seed)[0] for seed in range(24)])
    new = [surface(600 + i)[0] for i in range(20)] + [smoothed_away(700 + i) for i in range(20)]
    grids = detector.grids(new)
    known = lessons(detector, 5, masks=True)

    def ranks(seed: int, *, helped: bool) -> float:
        head = study(detector.memory, normals, known, invented=made if helped else (), seed=seed).head
        seen = [views(detector.memory.looked_up(grid)[1], grid) for grid in grids]
        found = metrics.auroc(np.arange(40) >= 20, np.array([float(raw_scores(head.maps(one))[0]) for one in seen]))
        assert found is not None
        return found

    with_them, without = (np.mean([ranks(seed, helped=helped) for seed in range(3)]) for helped in (True, False))
    assert with_them > without


def test_a_head_is_saved_with_its_detector(detector: PatchwiseDetector, normals: list[Grids], tmp_path: Path) -> None:
    taught = study(detector.memory, normals, lessons(detector, 3, masks=True))
    joined = detector.joined(taught.head, taught.normals.tolist())
    joined.save(tmp_path)
    pictures = [surface(500, defect=True)[0], surface(600)[0]]
    loaded = detectors.load(tmp_path).predict(pictures)
    assert [d.score for d in loaded] == pytest.approx([d.score for d in joined.predict(pictures)], abs=1e-5)
    assert loaded[0].score != pytest.approx(detector.predict(pictures)[0].score, abs=1e-4)


def test_a_rejected_alarm_calms_the_head_too(detector: PatchwiseDetector, normals: list[Grids]) -> None:
    taught = study(detector.memory, normals, lessons(detector, 8, masks=True))
    joined = detector.joined(taught.head, taught.normals.tolist())
    alarm = surface(500, defect=True)[0]
    assert joined.predict([alarm])[0].is_anomaly
    joined.take_as_normal(joined.quietening(alarm))
    assert not joined.predict([alarm])[0].is_anomaly


@pytest.mark.parametrize("level", [1.0, -3.0])
def test_fused_maps_reach_the_sum_of_both_scores_and_keep_their_order(level: float) -> None:
    random = torch.Generator().manual_seed(0)
    distances, deviations = (
        torch.rand(2, 12, 12, generator=random) + 1,
        torch.randn(2, 12, 12, generator=random) + level,
    )
    joined, both = fused(distances, deviations), distances + deviations
    assert torch.allclose(raw_scores(joined), raw_scores(distances) + raw_scores(deviations), atol=1e-5)
    assert torch.equal(joined.flatten(1).argsort(), both.flatten(1).argsort())
    assert (raw_scores(joined) >= raw_scores(both) - 1e-6).all()


def test_below_its_knee_a_head_says_little(detector: PatchwiseDetector, normals: list[Grids]) -> None:
    """Where normal images lie the map adds a fraction of its weight, beyond the knee all of it, without a step."""
    head = replace(study(detector.memory, normals, lessons(detector, 3, masks=True)).head, zero=1.0, knee=2.0)
    added = head.added(torch.tensor([[[0.0, 1.0, 3.0, 4.5]]]))[0, 0] / head.weight
    assert added.tolist() == pytest.approx([-BELOW, 0.0, 2 * BELOW, 2 * BELOW + 1.5])
    assert replace(head, knee=None).added(torch.tensor([[[4.0]]])).item() == pytest.approx(3 * head.weight)


def test_the_weight_scales_what_a_head_adds(detector: PatchwiseDetector, normals: list[Grids]) -> None:
    known = lessons(detector, 3, masks=True)
    whole, half, none = (study(detector.memory, normals, known, weight=weight) for weight in (1.0, 0.5, 0.0))
    assert half.head.weight == pytest.approx(whole.head.weight / 2)
    assert none.normals == pytest.approx(none.normals_before, abs=1e-5)
    assert none.lessons == pytest.approx(none.lessons_before, abs=1e-5)
    assert whole.lessons != pytest.approx(none.lessons, abs=1e-3)


@pytest.mark.parametrize("knee", [None, 2.0])
def test_a_head_is_restored_with_and_without_its_knee(
    detector: PatchwiseDetector, normals: list[Grids], knee: float | None
) -> None:
    head = replace(study(detector.memory, normals, lessons(detector, 3, masks=True)).head, knee=knee)
    restored = Head.restore(head.state())
    assert restored is not None
    assert (restored.knee, restored.zero, restored.weight) == (head.knee, head.zero, head.weight)


@pytest.mark.parametrize(("count", "seed"), [(12, 0), (12, 1), (12, 2), (12, 3), (3, 0), (2, 0)])
def test_a_few_normals_are_enough_for_many_defects(count: int, seed: int) -> None:
    """Each fold holds normal images out, also where there are hardly more of them than defects, or fewer."""
    made = cast("PatchwiseDetector", detectors.create(Options("patchcore", image_size=SIDE)))
    few = [surface(i)[0] for i in range(count)]
    made.fit(few, confirmed=[True] * len(few))
    taught = study(made.memory, made.grids(few), lessons(made, 10, masks=False), seed=seed)
    assert len(taught.normals) == count
    assert np.isfinite(taught.normals).all()
    assert np.isfinite(taught.lessons).all()


@pytest.mark.parametrize("networked", [False, True])
def test_heads_of_earlier_releases_score_as_they_did(
    detector: PatchwiseDetector, normals: list[Grids], networked: bool
) -> None:
    """They saw the first of the views alone, and took the highest of all deviations."""
    head = study(detector.memory, normals, lessons(detector, 3, masks=True)).head
    width = normals[0].patches.shape[-1]
    known = 2 * width + 1 if networked else width + 1
    judges = slice(None) if networked else slice(-1)
    assert head.network is not None
    old = replace(
        head,
        mean=head.mean[:known],
        scale=head.scale[:known],
        directions=head.directions[:, :known],
        centre=head.centre[judges],
        spread=head.spread[judges],
        network=replace(head.network, hidden=head.network.hidden[:known]) if networked else None,
        summed=False,
    )
    seen = views(detector.memory.looked_up(normals[0])[1], normals[0])
    restored = Head.restore(old.state())
    assert restored is not None
    assert torch.equal(restored.maps(seen), old.maps(seen[..., :known]))
    assert torch.equal(old.maps(seen), ((old.along(seen) - old.centre) / old.spread).amax(-1))


def test_two_judges_need_not_agree_on_the_place() -> None:
    """Their raw scores add up, and what either points at is the highest place."""
    first, second = torch.zeros(1, 32, 32), torch.zeros(1, 32, 32)
    first[0, 4:6, 4:6], second[0, 20:22, 20:22] = 3.0, 2.0
    both = together(first, second)
    assert torch.allclose(raw_scores(both), raw_scores(first) + raw_scores(second))
    assert int(both.flatten().argmax()) == int(first.flatten().argmax())
    assert float(both[0, 20, 20]) > float(both[0, 12, 12])


def test_directions_and_network_count_alike(detector: PatchwiseDetector, normals: list[Grids]) -> None:
    """Over the images that a head was trained on, the raw scores of either have mean 0 and deviation 1."""
    head = study(detector.memory, normals, lessons(detector, 3, masks=True)).head
    scores = []
    for place, grid in enumerate(normals):
        seen = views(detector.memory.looked_up(grid, without=[(place,)])[1].half().float(), grid)
        deviations = (head.along(seen) - head.centre) / head.spread
        scores.append(torch.stack([raw_scores(deviations[..., :-1].amax(-1)), raw_scores(deviations[..., -1])]))
    reached = torch.stack(scores)[..., 0]  # (n, 2)
    assert reached.mean(0).tolist() == pytest.approx([0, 0], abs=1e-3)
    assert reached.std(0).tolist() == pytest.approx([1, 1], abs=1e-3)


def test_the_head_sees_what_stands_out_within_its_image(detector: PatchwiseDetector, normals: list[Grids]) -> None:
    """An offset that a whole image shares changes the features, and not the features less its typical patch."""
    width = normals[0].patches.shape[-1]
    nothing = torch.zeros_like(normals[0].patches)
    before, after = (views(nothing, Grids(normals[0].patches + offset)) for offset in (0.0, 1.0))
    assert before.shape[-1] == 3 * width + 1
    assert torch.allclose(before[..., -width:], after[..., -width:], atol=1e-6)
    assert not torch.allclose(before, after)
    wide = views(nothing, Grids(normals[0].patches, torch.ones(1, 3, 3, 5)))
    assert torch.allclose(wide[..., -5:], torch.ones(()))


def test_one_defect_is_enough_and_the_seed_makes_it_repeatable(
    detector: PatchwiseDetector, normals: list[Grids]
) -> None:
    one = lessons(detector, 1, masks=False)
    first, second = (study(detector.memory, normals, one, seed=3) for _ in range(2))
    assert first.head.directions.shape[0] == 1
    assert np.allclose(first.normals, second.normals)


def test_training_can_be_cancelled(detector: PatchwiseDetector, normals: list[Grids]) -> None:
    def stop(_fraction: float, _stage: str) -> None:
        raise Cancelled("Cancelled.")

    with pytest.raises(Cancelled):
        study(detector.memory, normals, lessons(detector, 2, masks=False), progress=stop)


def test_padim_says_that_it_cannot_learn_defects() -> None:
    made = cast("PatchwiseDetector", detectors.create(Options("padim", image_size=SIDE)))
    pictures = [surface(seed)[0] for seed in range(4)]
    made.fit(pictures)
    assert not made.learns_defects
    with pytest.raises(ConfigError, match="patchcore-padim"):
        made.memory.looked_up(made.grids(pictures[:1])[0])


@pytest.mark.parametrize("seed", range(10))
def test_with_three_of_ten_verdicts_flipped_no_worse_head_passes_the_gate(seed: int) -> None:
    """Three defects are taken for normal and three normal surfaces for defects; new surfaces tell who is better."""
    start = 1000 * (seed + 1)
    taken = [surface(start + i)[0] for i in range(17)] + [surface(start + 50 + i, defect=True)[0] for i in range(3)]
    made = cast("PatchwiseDetector", detectors.create(Options("patchcore", image_size=SIDE)))
    grids = made.grids(taken)
    made.fit_grids(grids, taken, [True] * len(taken))
    wrong = [Lesson(grid) for grid in made.grids([surface(start + 100 + i)[0] for i in range(3)])]
    right = [Lesson(grid) for grid in made.grids([surface(start + 150 + i, defect=True)[0] for i in range(7)])]

    taught = study(made.memory, grids, [*wrong, *right], invented=invent(made.grids, taken), seed=seed)
    joined = made.joined(taught.head, taught.normals.tolist())
    decision = gate.decide(trials(made, joined, taught), seed=seed)

    new = [surface(start + 200 + i)[0] for i in range(20)] + [
        surface(start + 250 + i, defect=True)[0] for i in range(20)
    ]
    truth = np.array([False] * 20 + [True] * 20)
    champion, challenger = (
        metrics.auroc(truth, np.array([found.score for found in one.predict(new)])) for one in (made, joined)
    )
    assert champion is not None
    assert challenger is not None
    assert not decision.promote or challenger >= champion - 0.01, decision.reason
