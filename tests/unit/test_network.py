"""The deviation network, on patches whose normal variation hides what defects add."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from anomaly_workers import metrics
from anomaly_workers.detectors.deviation import Network
from anomaly_workers.errors import Cancelled
from anomaly_workers.refine.network import MARGIN, Space, train

WIDTH, FOLDS = 12, 3

pytestmark = pytest.mark.usefixtures("one_thread")


def normal(count: int, seed: int) -> Tensor:
    """Patches that vary a lot along the first axes and little along the last, around an offset."""
    spread = torch.linspace(10, 0.5, WIDTH)
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)) * spread + 3


def defective(count: int, seed: int, axis: int = -1) -> Tensor:
    """Normal patches with something that is small beside what varies anyway."""
    patches = normal(count, seed)
    patches[:, axis] += 3
    return patches


def space(patches: Tensor) -> Space:
    return Space(patches.mean(0), patches.std(0))


def trained(
    normals: Tensor,
    defects: Sequence[Sequence[Tensor]],
    without: Sequence[int | None],
    *,
    made: Sequence[Tensor] = (),
    made_fold: Sequence[int] = (),
    seed: int = 0,
) -> list[Network]:
    folds = torch.arange(len(normals)) % FOLDS
    return train(space(normal(2000, 0)), normals, folds, defects, without, made=made, made_fold=made_fold, seed=seed)


def ranks(net: Network, axis: int = -1) -> float:
    """Image AUROC, so to say, on patches that nobody has seen."""
    scores = torch.cat([net(normal(400, 50)), net(defective(400, 51, axis))]).numpy()
    found = metrics.auroc(np.arange(800) >= 400, scores)
    assert found is not None
    return found


def test_it_finds_new_patches_like_a_few_confirmed_ones() -> None:
    defects = [defective(6, seed) for seed in range(10, 15)]
    (net,) = trained(normal(2000, 0), [defects], [None])
    assert ranks(net) > 0.95


def test_even_faint_defects_reach_the_margin() -> None:
    (net,) = trained(normal(2000, 0), [[defective(20, seed) for seed in range(10, 15)]], [None])
    faint = normal(400, 50)
    typical = float(net(faint).mean())
    faint[:, -1] += 0.6 * 3
    assert float(net(faint).mean()) - typical > 0.8 * MARGIN
    assert float(net(defective(400, 51)).mean()) - typical > 1.5 * MARGIN


def test_what_a_fold_holds_out_does_not_change_its_network() -> None:
    normals, defects = normal(900, 0), [defective(6, seed) for seed in range(10, 14)]
    other = normals.clone()
    other[torch.arange(len(normals)) % FOLDS == 1] += 5
    of_nets = [defects[1:], defects]
    before, after = (trained(patches, of_nets, [1, None]) for patches in (normals, other))
    assert torch.equal(before[0].hidden, after[0].hidden)
    assert torch.equal(before[0].out, after[0].out)
    assert not torch.allclose(before[1].hidden, after[1].hidden)
    alone = trained(normals, of_nets[:1], [1])[0]
    assert torch.allclose(alone.hidden, before[0].hidden, atol=1e-5)  # the one trained beside it does not matter


def test_made_up_defects_teach_what_no_confirmed_one_shows() -> None:
    defects, made = [defective(6, seed) for seed in range(10, 15)], [defective(20, seed, -2) for seed in range(60, 80)]
    normals, folds = normal(2000, 0), [0] * len(made)
    (without,), (with_them,) = (
        trained(normals, [defects], [None]),
        trained(normals, [defects], [None], made=made, made_fold=folds),
    )
    assert ranks(without, -2) < 0.7
    assert ranks(with_them, -2) > 0.8  # 0.94 is the most: the shift is 2.2 deviations
    assert ranks(with_them) > 0.95


def test_a_made_up_defect_is_held_out_with_the_image_behind_it() -> None:
    normals, defects = normal(900, 0), [defective(6, seed) for seed in range(10, 14)]
    made = [defective(20, seed, -2) for seed in range(60, 66)]
    other = [made[0] + 5, *made[1:]]
    before, after = (
        trained(normals, [defects, defects], [1, None], made=some, made_fold=[1, 0, 0, 1, 2, 2])
        for some in (made, other)
    )
    assert torch.equal(before[0].hidden, after[0].hidden)
    assert not torch.allclose(before[1].hidden, after[1].hidden)


def test_the_seed_makes_it_repeatable() -> None:
    defects = [[defective(6, 10)]]
    first, second, other = (trained(normal(600, 0), defects, [None], seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first.hidden, second.hidden)
    assert not torch.equal(first.hidden, other.hidden)


def test_it_trains_where_everything_else_runs_without_gradients() -> None:
    with torch.inference_mode():
        (net,) = trained(normal(600, 0), [[defective(6, 10)]], [None])
        assert not net(normal(5, 1)).requires_grad


def test_training_can_be_cancelled() -> None:
    def stop(fraction: float, _stage: str) -> None:
        if fraction > 0:
            raise Cancelled("Cancelled.")

    with pytest.raises(Cancelled):
        train(
            space(normal(2000, 0)),
            normal(60, 0),
            torch.zeros(60, dtype=torch.long),
            [[defective(6, 10)]],
            [None],
            seed=0,
            progress=stop,
        )
