"""A small subset of patches that covers all of them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anomaly_workers.detectors.neighbours import square_norms
from anomaly_workers.types import Progress, no_progress

PROJECTED = 64
"""Dimensions distances are measured in while choosing (Johnson-Lindenstrauss, as in PatchCore's section 3.2)."""

BLOCK = 256
"""Far rows that are looked at together, see `farthest_points`."""


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
    """Return indices (count,) by farthest-first traversal of rows (n, d), beginning with `start`.

    Exact, yet with few passes over all rows: while the farthest row of a block of far rows is farther than every row
    outside the block was, it is the farthest of all, and only distances inside the block are needed to go on. Then one
    matrix product brings the distances of all rows up to date.
    """
    norms = square_norms(rows)
    chosen = [start]
    gaps = _squared(rows, norms, rows[[start]])[:, 0]  # (n,): squared distance to the nearest chosen row
    gaps[start] = -1.0
    while len(chosen) < count:
        far, block = gaps.topk(min(BLOCK, len(rows)))
        inside = _squared(rows[block], norms[block], rows[block]).cpu().numpy()  # (b, b)
        picks = _picks(far.cpu().numpy().copy(), inside, most=count - len(chosen))
        new = block[torch.as_tensor(picks, device=block.device)]
        gaps = torch.minimum(gaps, _squared(rows, norms, rows[new]).amin(dim=1))
        gaps[new] = -1.0  # a duplicate of a chosen row may be chosen, a row itself never again
        chosen += new.tolist()
        progress(len(chosen) / count, "choosing the memory bank")
    return torch.tensor(chosen, device=rows.device)


def _picks(gaps: NDArray[np.float32], inside: NDArray[np.float32], *, most: int) -> list[int]:
    """Choose rows of a block, sorted by falling gaps (b,), as long as none outside it can be farther."""
    bound = gaps[-1] if len(gaps) == BLOCK else -1.0
    picks: list[int] = []
    while len(picks) < most:
        best = int(gaps.argmax())
        if picks and (gaps[best] < bound or gaps[best] < 0):
            break
        picks.append(best)
        np.minimum(gaps, inside[:, best], out=gaps)
        gaps[best] = -1.0
    return picks


def _squared(rows: Tensor, norms: Tensor, others: Tensor) -> Tensor:
    """Return squared distances (n, m) of rows (n, d) with known norms to others (m, d)."""
    return torch.addmm(square_norms(others)[None], rows, others.T, alpha=-2).add_(norms[:, None]).clamp_min_(0)


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
