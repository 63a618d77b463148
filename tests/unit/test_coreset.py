"""The coreset and the nearest neighbours, against the few lines that define them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anomaly_workers.detectors import coreset, neighbours
from anomaly_workers.detectors.coreset import farthest_points, greedy_coreset
from anomaly_workers.detectors.neighbours import nearest
from anomaly_workers.errors import Cancelled


def rows(count: int, width: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def naive_farthest(points: Tensor, count: int, start: int) -> list[int]:
    chosen = [start]
    while len(chosen) < count:
        gaps = torch.cdist(points.double(), points[chosen].double()).amin(dim=1)
        chosen.append(int(gaps.argmax()))
    return chosen


def test_traversal_equals_the_definition() -> None:
    points = rows(700)

    chosen = farthest_points(points, 90, start=5)

    assert chosen.tolist() == naive_farthest(points, 90, 5)


def test_traversal_of_a_line_halves_it_again_and_again() -> None:
    line = torch.arange(9.0)[:, None]

    chosen = farthest_points(line, 5, start=0)

    assert chosen.tolist()[:3] == [0, 8, 4]
    assert set(chosen.tolist()[3:]) == {2, 6}


def test_duplicates_are_chosen_last_and_never_twice() -> None:
    points = torch.cat([rows(40), torch.zeros(300, 12)])

    chosen = farthest_points(points, 340, start=0).tolist()

    assert len(set(chosen)) == 340
    assert set(range(40)) <= set(chosen[:41])


def test_coreset_is_at_most_twice_as_far_as_the_sample_itself() -> None:
    points = rows(2000, 3)

    chosen = greedy_coreset(points, 200, seed=1)

    random_radius = torch.cdist(points, points[:200]).amin(dim=1).max()
    assert torch.cdist(points, points[chosen]).amin(dim=1).max() < random_radius


def test_seed_decides_and_candidates_bound_the_choice() -> None:
    points = rows(500, 100)

    first, again, other = (greedy_coreset(points, 30, seed=seed, candidates=100) for seed in (7, 7, 8))

    assert first.tolist() == again.tolist() != other.tolist()
    assert len(set(first.tolist())) == 30


def test_more_than_there_is_gives_everything() -> None:
    assert sorted(greedy_coreset(rows(20), 50, seed=0).tolist()) == list(range(20))


def test_progress_can_cancel() -> None:
    def stop(_fraction: float, _stage: str) -> None:
        raise Cancelled("stopped")

    with pytest.raises(Cancelled):
        greedy_coreset(rows(600), 100, seed=0, progress=stop)


def test_nearest_equals_all_pairs_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "CHUNK", 7)
    queries, bank = rows(50), rows(30, seed=1)

    assert torch.allclose(nearest(queries, bank), torch.cdist(queries, bank).amin(dim=1), atol=1e-4)
    assert nearest(queries[:0], bank).shape == (0,)


@pytest.mark.parametrize("rank", [2, neighbours.FEW, neighbours.FEW + 1])
def test_a_farther_neighbour_is_the_one_of_that_rank(rank: int) -> None:
    queries, bank = rows(50), rows(30, seed=1)

    wanted = torch.cdist(queries, bank).sort(dim=1).values[:, rank - 1]
    assert torch.allclose(nearest(queries, bank, rank=rank), wanted, atol=1e-4)


def test_block_is_smaller_than_the_rows_it_is_tried_on() -> None:
    assert coreset.BLOCK < 700
