"""Query strategies: what a person should look at first."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from anomaly_workers.active import strategies
from anomaly_workers.active.clusters import GROUPS, UNSUSPICIOUS, clusters
from anomaly_workers.active.places import FRONT, places
from anomaly_workers.active.strategies import STRATEGIES, Pool, interleaved
from anomaly_workers.errors import ConfigError


def pool_of(count: int = 40, *, seed: int = 0, width: int = 5) -> Pool:
    random = np.random.default_rng(seed)
    return Pool(
        tasks=np.arange(100, 100 + count),
        scores=random.random(count),
        threshold=0.5,
        embeddings=random.normal(size=(count, width)).astype(np.float32),
        parts=random.random((count, 2)),
    )


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("count", [0, 1, 7, 40, 100])
def test_every_strategy_gives_as_many_as_are_wanted_and_none_twice(name: str, count: int) -> None:
    order = STRATEGIES[name](pool_of(), count)

    assert len(order) == len(set(order.tolist())) == min(count, 40)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_bears_an_empty_pool(name: str) -> None:
    empty = Pool(np.zeros(0, np.int64), np.zeros(0), 0.5, np.zeros((0, 4), np.float32))

    assert len(STRATEGIES[name](empty, 5)) == 0


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_says_the_same_twice(name: str) -> None:
    assert STRATEGIES[name](pool_of(), 20).tolist() == STRATEGIES[name](pool_of(), 20).tolist()


def test_highest_and_margin_go_by_the_score() -> None:
    pool = replace(pool_of(4), scores=np.asarray([0.1, 0.9, 0.45, 0.7]), threshold=0.5)

    assert strategies.highest(pool, 4).tolist() == [1, 3, 2, 0]
    assert strategies.margin(pool, 4).tolist() == [2, 3, 0, 1]


def test_disagreement_goes_by_ranks_whatever_the_scales() -> None:
    parts = np.asarray([[1.0, 300.0], [2.0, 200.0], [3.0, 100.0], [4.0, 400.0]])
    pool = replace(pool_of(4), parts=parts)

    assert set(strategies.disagreement(pool, 2).tolist()) == {0, 2}
    assert strategies.disagreement(pool, 4)[-1] in (1, 3)


def test_disagreement_counts_where_one_of_the_two_is_alarmed() -> None:
    bank = np.arange(20.0)
    head = bank.copy()
    head[[0, 6]] = head[[6, 0]]  # both find them normal
    head[[14, 19]] = head[[19, 14]]
    pool = replace(pool_of(20), parts=np.stack([bank, head], axis=1))

    assert set(strategies.disagreement(pool, 2).tolist()) == {14, 19}


def test_without_a_head_disagreement_is_the_margin() -> None:
    pool = replace(pool_of(), parts=None)

    assert strategies.disagreement(pool, 9).tolist() == strategies.margin(pool, 9).tolist()


def test_diverse_is_the_k_center_greedy_of_scikit_activeml() -> None:
    skactiveml = pytest.importorskip("skactiveml.pool", reason="a development dependency: run `make test`")
    pool = pool_of(60, width=3)
    reviewed = np.random.default_rng(9).normal(size=(4, 3)).astype(np.float32)
    rows = np.concatenate([reviewed, pool.embeddings])
    verdicts = np.concatenate([np.zeros(4), np.full(60, np.nan)])

    theirs = skactiveml.CoreSet(random_state=0).query(rows, verdicts, batch_size=12)
    ours = strategies.diverse(replace(pool, reviewed=reviewed), 12)

    assert (ours + 4).tolist() == theirs.tolist()


def test_random_keeps_its_order_when_others_are_reviewed() -> None:
    pool = pool_of(30)
    before = pool.tasks[strategies.random(pool, 30)].tolist()
    rest = Pool(pool.tasks[5:], pool.scores[5:], 0.5, pool.embeddings[5:])

    after = rest.tasks[strategies.random(rest, 25)].tolist()

    assert after == [task for task in before if task in set(rest.tasks.tolist())]


def test_a_cold_start_and_later_each_get_their_shares() -> None:
    pool = pool_of(400)
    cold, later = strategies.mix(pool, 20), strategies.mix(replace(pool, defects=5), 20)

    top = set(strategies.highest(pool, 20).tolist())
    assert len(top & set(cold.tolist())) >= 10
    assert 8 <= len(top & set(later.tolist())) < 20
    assert cold.tolist() != later.tolist()


def test_interleaving_serves_by_share_and_each_once() -> None:
    orders = [np.arange(0, 100), np.arange(1000, 1100), np.arange(0, 100)]

    merged = interleaved(orders, [0.5, 0.3, 0.2], 50).tolist()

    assert len(set(merged)) == 50
    assert Counter(index >= 1000 for index in merged)[True] == 15


def test_interleaving_goes_on_when_an_order_ends() -> None:
    assert interleaved([np.asarray([1]), np.asarray([2, 3, 4])], [0.9, 0.1], 10).tolist() == [1, 2, 3, 4]


def test_an_unknown_strategy_is_refused_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="margin"):
        strategies.named("clever")


def test_clusters_group_what_is_suspicious_and_leave_the_rest_together() -> None:
    pool = pool_of(100)
    kinds = np.arange(100) % 3
    pool = replace(pool, embeddings=(np.eye(3)[kinds] * 10).astype(np.float32))

    found = clusters(pool, {})

    low = pool.scores < min(0.5, np.quantile(pool.scores, 0.8))
    assert set(found[low].tolist()) == {UNSUSPICIOUS}
    for kind in range(3):
        assert len(set(found[~low & (kinds == kind)].tolist())) == 1
    assert len(set(found[~low].tolist())) == 3 <= GROUPS


def test_clusters_that_are_known_stay() -> None:
    pool = pool_of(60)
    before = clusters(pool, {})
    known = {int(task): int(group) for task, group in zip(pool.tasks[:50], before[:50], strict=True) if group}

    after = clusters(pool, known)

    assert after[:50].tolist() == before[:50].tolist()


def test_places_rise_along_the_order_within_the_front() -> None:
    found = places([5, 3, 9, 1], {})

    values = [found[task] for task in (5, 3, 9, 1)]
    assert values == sorted(values)
    assert values[0] > 0
    assert values[-1] < FRONT


def test_places_change_as_few_as_possible() -> None:
    now = places([1, 2, 3, 4, 5, 6], {})

    after = places([2, 3, 7, 4, 6, 5, 8], now)

    assert sorted(after, key=after.__getitem__) == [2, 3, 7, 4, 6, 5, 8]
    assert {task for task in after if after[task] == now.get(task)} >= {2, 3, 4}
    assert sum(after[task] != now.get(task) for task in after) == 3


def test_places_spread_again_when_there_is_no_room() -> None:
    tight = {1: 0.005, 2: float(np.nextafter(0.005, 1))}

    found = places([1, 7, 2], tight)

    assert found[1] < found[7] < found[2]
