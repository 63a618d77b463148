"""Query strategies as plain functions: from what is known of the open images to an order, most wanted first."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from anomaly_workers.errors import ConfigError

Order = NDArray[np.intp]

ENOUGH_DEFECTS = 5
"""Confirmed defects from which on a project is no longer a cold start."""

COLD_START = {"highest": 0.5, "diverse": 0.3, "random": 0.2}
"""Shares of the default mix before there is something to learn from (Pelleg and Moore 2004 find rare categories by
likelihood, Sener and Savarese 2018 by coverage; the random part alone says what the others miss)."""

LATER = {"highest": 0.4, "margin": 0.15, "disagreement": 0.15, "diverse": 0.15, "random": 0.15}
"""Shares of the default mix once defects are confirmed."""


@dataclass(frozen=True, slots=True)
class Pool:
    """The open images of a project.

    Attributes:
        tasks: (n,) task ids, which make random choices repeatable.
        scores: (n,) calibrated anomaly scores in [0, 1].
        threshold: the operating point on that scale.
        embeddings: (n, d) what each image's hottest patches look like.
        parts: (n, 2) raw scores of memory bank and head apart, any scales; None where there is no head.
        reviewed: (m, d) embeddings of the images that were reviewed already.
        defects: how many defects are confirmed.
    """

    tasks: NDArray[np.int64]
    scores: NDArray[np.float64]
    threshold: float
    embeddings: NDArray[np.float32]
    parts: NDArray[np.float64] | None = None
    reviewed: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    defects: int = 0

    def __len__(self) -> int:
        return len(self.tasks)


Strategy = Callable[[Pool, int], Order]
"""Takes a pool and how many images are wanted; returns that many indices, or all there are, most wanted first."""


def highest(pool: Pool, count: int) -> Order:
    """Take the highest anomaly scores first."""
    return _first(np.argsort(-pool.scores, kind="stable"), count)


def margin(pool: Pool, count: int) -> Order:
    """Take first what is nearest to the threshold, on either side (margin sampling, Settles 2009, section 3.1)."""
    return _first(np.argsort(np.abs(pool.scores - pool.threshold), kind="stable"), count)


def disagreement(pool: Pool, count: int) -> Order:
    """Take first where memory bank and head differ most in their ranking (query by committee, Seung et al. 1992).

    Ranks, because their raw scores have no common scale; and surprise, because among the many images that both find
    normal the ranks are noise. Without a head it is `margin`.
    """
    if pool.parts is None:
        return margin(pool, count)
    bank, head = (_surprise(column) for column in pool.parts.T)
    return _first(np.argsort(-np.abs(bank - head), kind="stable"), count)


def diverse(pool: Pool, count: int) -> Order:
    """Take first what looks least like anything reviewed or taken before.

    This is the k-center greedy of Sener and Savarese (arXiv 1708.00489, algorithm 1).
    """
    chosen: list[int] = []
    gaps = _gaps(pool)
    for _ in range(min(count, len(pool))):
        best = int(gaps.argmax())
        chosen.append(best)
        away = ((pool.embeddings - pool.embeddings[best]) ** 2).sum(axis=1)
        np.minimum(gaps, away, out=gaps)
        gaps[chosen] = -1.0
    return np.asarray(chosen, np.intp)


def random(pool: Pool, count: int) -> Order:
    """Take any, the same ones whenever the same tasks are open."""
    digests = [hashlib.blake2s(str(int(task)).encode(), digest_size=8).digest() for task in pool.tasks]
    return _first(np.asarray(sorted(range(len(digests)), key=digests.__getitem__), np.intp), count)


def mix(pool: Pool, count: int) -> Order:
    """Take from several strategies in turn, by their shares: the default.

    Before `ENOUGH_DEFECTS` are confirmed: `COLD_START`, then `LATER`. The random part also gives the gate images that
    no model chose.
    """
    shares = COLD_START if pool.defects < ENOUGH_DEFECTS else LATER
    return interleaved([STRATEGIES[name](pool, count) for name in shares], list(shares.values()), count)


STRATEGIES: Mapping[str, Strategy] = {
    "mix": mix,
    "highest": highest,
    "margin": margin,
    "disagreement": disagreement,
    "diverse": diverse,
    "random": random,
}


def named(name: str) -> Strategy:
    """Return a strategy by its name.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"{name!r} is no query strategy. Use one of: {', '.join(STRATEGIES)}.")
    return STRATEGIES[name]


def interleaved(orders: Sequence[Order], shares: Sequence[float], count: int) -> Order:
    """Merge orders by shares, each index once: at any place the order furthest behind its share is next.

    Args:
        orders: indices, most wanted first; one that ends early is passed over.
        shares: positive, one an order.
        count: how many indices to return at most.
    """
    queues = [iter(order.tolist()) for order in orders]
    taken: list[int] = []
    seen: set[int] = set()
    served = [0.0] * len(orders)
    while len(taken) < count and any(share < np.inf for share in served):
        turn = min(range(len(orders)), key=lambda one: ((served[one] + 0.5) / shares[one], one))
        index = next((index for index in queues[turn] if index not in seen), None)
        if index is None:
            served[turn] = np.inf
            continue
        served[turn] += 1
        seen.add(index)
        taken.append(index)
    return np.asarray(taken, np.intp)


def _gaps(pool: Pool) -> NDArray[np.float32]:
    """Return the squared distance of each image to the nearest reviewed one; to the mean of all where none is."""
    if not len(pool):
        return np.zeros(0, np.float32)
    known = pool.reviewed if len(pool.reviewed) else pool.embeddings.mean(axis=0, keepdims=True)
    squares = (pool.embeddings**2).sum(axis=1)[:, None] + (known**2).sum(axis=1)[None]
    return np.asarray(np.maximum(squares - 2 * pool.embeddings @ known.T, 0).min(axis=1), np.float32)


def _surprise(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return -log of the share of values that are at least as high as each: ranks that count most at the top."""
    ranks = np.empty(len(values))
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return -np.log1p(-ranks / max(len(values), 1))


def _first(order: NDArray[np.intp], count: int) -> Order:
    return order[: max(count, 0)]
