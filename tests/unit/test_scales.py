"""Two scales: patches, and the surroundings that a deep layer sees."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
import safetensors.torch
import torch

from anomaly_workers import backbones, detectors
from anomaly_workers.detectors.base import Options
from anomaly_workers.detectors.joint import Joint
from anomaly_workers.detectors.maps import raw_scores
from anomaly_workers.detectors.patchwise import TENSORS, PatchwiseDetector
from anomaly_workers.detectors.scales import CONTEXT, Grids, Scales
from anomaly_workers.types import Picture

SIDE = 96
CONTEXT_TENSORS = "context."


def picture(seed: int) -> Picture:
    noise = np.random.default_rng(seed).normal(120, 25, (SIDE, SIDE, 3))
    return Picture(np.clip(noise, 0, 255).astype(np.uint8), size=(SIDE, SIDE))


def grids(seed: int, *, context: bool = True) -> Grids:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.rand(1, 2, 3, 12, generator=generator)
    return Grids(torch.rand(1, 8, 12, 6, generator=generator), wide if context else None)


@pytest.fixture(scope="module")
def learnt() -> Scales:
    return Scales.learn(Joint, Joint, [grids(seed) for seed in range(8)], seed=0)


@pytest.fixture(scope="module")
def detector() -> PatchwiseDetector:
    made = cast("PatchwiseDetector", detectors.create(Options(image_size=SIDE)))
    made.fit([picture(seed) for seed in range(8)], confirmed=[True] * 8)
    return made


def test_a_score_is_of_both_scales_and_its_places_are_those_of_the_patches(learnt: Scales) -> None:
    seen = grids(99)
    assert seen.context is not None
    assert learnt.context is not None
    near = learnt.patches.distances(seen.patches)
    far = learnt.context.distances(seen.context)
    far = torch.nn.functional.interpolate(far[None], size=seen.shape, mode="bilinear")[0]

    found = learnt.distances(seen)

    assert torch.allclose(raw_scores(found), raw_scores(near ** (1 - CONTEXT) * (far / learnt.unit) ** CONTEXT))
    assert torch.equal(found.flatten().argsort(), near.flatten().argsort())
    assert torch.allclose(found.flatten(1).median(), near.flatten(1).median())
    assert torch.allclose(found, learnt.looked_up(seen)[0], atol=1e-3)


def test_odd_surroundings_alone_raise_the_score_and_leave_what_is_typical(learnt: Scales) -> None:
    seen = grids(3)
    assert seen.context is not None
    plain = learnt.distances(seen, without=[(3,)])
    odd = learnt.distances(Grids(seen.patches, seen.context + 2), without=[(3,)])
    assert raw_scores(odd) > raw_scores(plain)
    assert torch.allclose(odd.median(), plain.median())


def test_a_patch_taken_as_normal_is_calm_whatever_surrounds_it(learnt: Scales) -> None:
    seen = grids(99)
    assert seen.context is not None
    calm = learnt.plus(seen.patches[0].flatten(0, 1))
    assert calm.distances(Grids(seen.patches, seen.context + 2)).max() < 0.1 * learnt.distances(seen).max()


def test_a_network_without_context_is_seen_at_one_scale() -> None:
    several = [grids(seed, context=False) for seed in range(8)]
    learnt = Scales.learn(Joint, Joint, several, seed=0)
    assert learnt.context is None
    assert torch.equal(learnt.distances(several[0]), learnt.patches.distances(several[0].patches))
    assert Scales.restore(Joint, Joint, learnt.state()).context is None


def test_the_embedded_network_gives_context_to_the_default_method_alone() -> None:
    pixels = picture(0).pixels[None]
    network = backbones.create(backbones.EMBEDDED, context=True)
    assert [layer.shape[1] for layer in network.features(pixels)] == [40, 112, 320]
    assert network.has_context
    patchcore = cast("PatchwiseDetector", detectors.create(Options("patchcore", image_size=SIDE)))
    assert not patchcore.backbone.has_context
    assert patchcore.grids([picture(0)])[0].context is None


@pytest.mark.parametrize(
    ("name", "expected"), [("vit_tiny_patch16_224", False), ("torchvision:resnet18", True), ("resnet18", True)]
)
def test_context_is_a_layer_of_stride_32(name: str, expected: bool) -> None:
    network = backbones.create(name, weights=backbones.RANDOM, context=True)
    layers = network.features(picture(0).pixels[None])
    assert network.has_context is expected
    assert (layers[-1].shape[-1] == SIDE // backbones.CONTEXT_STRIDE) is expected


def test_both_scales_are_saved(detector: PatchwiseDetector, tmp_path: Path) -> None:
    detector.save(tmp_path)
    again = type(detector).load(tmp_path)
    seen = [picture(50)]
    assert again.predict(seen)[0].score == detector.predict(seen)[0].score


def test_a_version_saved_before_there_was_context_scores_as_it_did(detector: PatchwiseDetector, tmp_path: Path) -> None:
    detector.save(tmp_path)
    state = safetensors.torch.load_file(tmp_path / TENSORS)
    old = {name: tensor for name, tensor in state.items() if not name.startswith(CONTEXT_TENSORS)}
    assert len(old) < len(state)
    safetensors.torch.save_file(old, tmp_path / TENSORS)

    again = type(detector).load(tmp_path)

    (seen,) = again.grids([picture(50)])
    assert again.memory.context is None
    assert torch.allclose(again.memory.distances(seen), detector.memory.patches.distances(seen.patches), atol=1e-3)


def test_pictures_that_were_uploaded_twice_leave_finite_scores_in_order() -> None:
    made = cast("PatchwiseDetector", detectors.create(Options(image_size=SIDE)))
    made.fit([picture(seed // 2) for seed in range(16)], confirmed=[True] * 16)
    odd = picture(50)
    odd.pixels[30:60, 30:60] = 255
    flat = Picture(np.full((SIDE, SIDE, 3), 128, np.uint8), size=(SIDE, SIDE))

    known, seen, other = made.predict([picture(0), odd, flat])

    assert all(np.isfinite(one.anomaly_map).all() and 0 <= one.score <= 1 for one in (known, seen, other))
    assert known.score < min(seen.score, other.score)


def test_a_picture_that_was_uploaded_twice_is_learnt_once() -> None:
    once, twice = (cast("PatchwiseDetector", detectors.create(Options(image_size=SIDE))) for _ in range(2))
    seen = [picture(seed) for seed in range(8)]
    once.fit(seen, confirmed=[True] * 8)
    twice.fit([*seen, *seen], confirmed=[True] * 16)
    assert twice.held_out == pytest.approx(once.held_out, abs=1e-4)

    kept = twice.fit_grids(twice.grids([*seen, *seen]), [*seen, *seen], [False] * 8 + [True] * 8)
    assert kept == list(range(8, 16))  # those that somebody confirmed


def test_one_picture_alone_may_be_there_twice() -> None:
    made = cast("PatchwiseDetector", detectors.create(Options(image_size=SIDE)))
    made.fit([picture(0), picture(0)])
    assert len(made.held_out) == 2
