"""A small subset of patches that covers all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from anomaly_workers.detectors.neighbours import square_norms
from anomaly_workers.types import Progress, no_progress

PROJECTED = 64
"""Dimensions distances are measured in while choosing (Johnson-Lindenstrauss, as in PatchCore's section 3.2)."""

TICK = 64
"""Choices between two progress reports, each of which may cancel."""


def greedy_coreset(
    rows: Tensor, count: int, *, seed: int, candidates: int = 0, progress: Progress = no_progress
) -> Tensor:
    """Return the indices of `count` rows (n, d) chosen greedily: always the one farthest from all chosen so far.

    This is the k-center greedy of PatchCore (arXiv 2106.08265, algorithm 1), at most twice as far from any row as the
    best subset would be. Its time is n x count, so that it may run on a random sample of `candidates` rows: a sample
    of several times `count` rows covers nearly as well.

    Args:
        rows: (n, d).
        count: how many to choose; all if there are no more.
        seed: makes the first choice, the sample and the projection repeatable.
        candidates: rows to choose among; 0 means all.
        progress: told the done fraction; may raise to cancel.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = _sample(len(rows), candidates, generator).to(rows.device)
    if count >= len(pool):
        return pool
    reduced = _projected(rows[pool], generator)
    chosen = farthest_points(reduced, count, start=_start(len(pool), generator), progress=progress)
    return pool[chosen]


def farthest_points(rows: Tensor, count: int, *, start: int, progress: Progress = no_progress) -> Tensor:
    """Return indices (count,) by farthest-first traversal of rows (n, d), beginning with `start`."""
    norms = square_norms(rows)
    chosen = torch.empty(count, dtype=torch.long, device=rows.device)
    chosen[0] = start
    gaps = torch.full_like(norms, float("inf"))  # (n,): squared distance to the nearest chosen row, less |row|²
    for step in range(1, count):
        last = chosen[step - 1]
        torch.minimum(gaps, torch.mv(rows, rows[last]).mul_(-2).add_(norms[last]), out=gaps)
        chosen[step] = (gaps + norms).argmax()
        if step % TICK == 0:
            progress(step / count, "choosing the memory bank")
    return chosen


def _sample(total: int, wanted: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(total, generator=generator)
    return order[:wanted] if 0 < wanted < total else order


def _projected(rows: Tensor, generator: torch.Generator) -> Tensor:
    if rows.shape[1] <= PROJECTED:
        return rows
    matrix = torch.randn(rows.shape[1], PROJECTED, generator=generator) / PROJECTED**0.5
    return torch.mm(rows, matrix.to(rows.device))


def _start(total: int, generator: torch.Generator) -> int:
    return int(torch.randint(total, (1,), generator=generator))
