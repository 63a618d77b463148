"""Nearest neighbours as chunked matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1024
"""Queries a product: 1024 x 3000 float32 distances are 12 MB and stay in a CPU's cache, 4096 take twice as long."""

FEW = 16
"""Ranks up to this one are cheap to sort."""


def nearest(queries: Tensor, bank: Tensor, *, norms: Tensor | None = None, rank: int = 1) -> Tensor:
    """Return the Euclidean distance (n,) of each query (n, d) to its nearest, or rank-th nearest, row of bank (m, d).

    |q - b|² = |q|² - 2 q·b + |b|²; the bank's norms may be given, so that they are computed once.
    """
    norms = square_norms(bank) if norms is None else norms
    found = [_nearest_chunk(chunk, bank, norms, rank) for chunk in torch.split(queries, CHUNK)]
    return torch.cat(found) if found else queries.new_zeros(0)


def nearest_rows(queries: Tensor, bank: Tensor, *, norms: Tensor | None = None) -> Tensor:
    """Return the index (n,) of the row of bank (m, d) nearest to each query (n, d)."""
    norms = square_norms(bank) if norms is None else norms
    found = [torch.addmm(norms[None], chunk, bank.T, alpha=-2).argmin(dim=1) for chunk in torch.split(queries, CHUNK)]
    return torch.cat(found)


def square_norms(rows: Tensor) -> Tensor:
    """Return |row|² (n,) of rows (n, d)."""
    return (rows * rows).sum(dim=1)


def _ranked(products: Tensor, rank: int) -> Tensor:
    """Return the rank-th least of each row; for low ranks `topk` takes a fifth of `kthvalue`'s time."""
    if rank > FEW:
        return products.kthvalue(rank, dim=1).values
    return products.topk(rank, dim=1, largest=False).values[:, -1]


def _nearest_chunk(queries: Tensor, bank: Tensor, norms: Tensor, rank: int) -> Tensor:
    products = torch.addmm(norms[None], queries, bank.T, alpha=-2)  # (n, m): |b|² - 2 q·b
    least = products.amin(dim=1) if rank == 1 else _ranked(products, rank)  # (n,)
    squared = least + square_norms(queries)
    return squared.clamp_min_(0).sqrt_()
