"""Places in the queue as numbers that Label Studio sorts by, with as few changes as possible."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence

FRONT = 0.01
"""Scores below belong to the front of the queue; all others are confidences."""


def places(order: Sequence[int], now: Mapping[int, float]) -> dict[int, float]:
    """Return a score in (0, FRONT) for each task of `order`, rising along it.

    As many tasks as possible keep the place they have: those of the longest part of `order` whose places rise already.
    The others are spread evenly between their neighbours.
    """
    kept = _rising([task for task in order if 0 < now.get(task, 0.0) < FRONT], now)
    found: dict[int, float] = {}
    below, waiting = 0.0, []
    for task in [*order, None]:
        if task is not None and task not in kept:
            waiting.append(task)
            continue
        above = now[task] if task is not None else FRONT
        step = (above - below) / (len(waiting) + 1)
        found |= {one: below + step * (place + 1) for place, one in enumerate(waiting)}
        if task is not None:
            found[task] = below = above
        waiting = []
    if len(set(found.values())) < len(found):  # no room left between two neighbours
        return places(order, {})
    return found


def _rising(tasks: Sequence[int], now: Mapping[int, float]) -> set[int]:
    """Return the members of the longest strictly rising subsequence (patience sorting)."""
    tails: list[float] = []
    ends: list[int] = []
    before: dict[int, int | None] = {}
    for task in tasks:
        pile = bisect_left(tails, now[task])
        before[task] = ends[pile - 1] if pile else None
        tails[pile : pile + 1] = [now[task]]
        ends[pile : pile + 1] = [task]
    kept: set[int] = set()
    task_or_none = ends[-1] if ends else None
    while task_or_none is not None:
        kept.add(task_or_none)
        task_or_none = before[task_or_none]
    return kept
