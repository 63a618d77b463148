"""The deviation network, trained by gradient on the deviation loss, for all folds of a cross-validation at once.

Pang, Shen and van den Hengel, KDD 2019 (arXiv 1911.08623, sections 3.2 to 3.4), patch by patch as in arXiv 2108.00462.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from anomaly_workers.detectors.deviation import SLOPE, Network
from anomaly_workers.types import Progress, no_progress

REFERENCES = 5000
"""Reference scores, drawn from the standard normal distribution."""

MARGIN = 5.0
"""Deviation that a defect's patch has to reach."""

HIDDEN, STEPS, RATE, DECAY = 16, 400, 4e-3, 1e-2
"""Units, steps, learning rate and weight decay. With 150 steps the head alone ranked whole tiles and positions held out
of magnetic_tile and ball_screw at .812 and .897, with 400 at .840 and .895; 64 units instead of 16: the same."""

NORMALS, PASTED = 512, 256
"""Normal and synthesised patches in each step; every defect has an equal share of the latter."""

FAINTEST = 0.5
"""Synthesised defects have this share, or up to all, of what a confirmed one adds to a typical normal patch. Whole
tiles of magnetic_tile held out, head alone, in one or two draws: .741 with the confirmed patches as they are, .776 and
.801 when mixed with normal ones (at least .5 and .2 of the defect), .812 when added."""


class Space:
    """Standardises and whitens the views of patches.

    Args:
        mean: (D,) of normal patches.
        scale: (D,) their standard deviation.
        inverse: (D, D) of their (ridged) correlation.
    """

    def __init__(self, mean: Tensor, scale: Tensor, inverse: Tensor) -> None:
        self.into: Tensor = torch.linalg.cholesky(inverse.double()).float() / scale[:, None]  # (D, D)
        self.origin = mean

    def __call__(self, seen: Tensor) -> Tensor:
        """Return views (n, D) as (n, D) uncorrelated values around 0."""
        white: Tensor = (seen - self.origin) @ self.into
        return white


def train(
    space: Space,
    normals: Tensor,
    normal_fold: Tensor,
    defects: Sequence[Sequence[Tensor]],
    without: Sequence[int | None],
    *,
    seed: int,
    progress: Progress = no_progress,
) -> list[Network]:
    """Train one network for each of F left out folds; they share normal patches and steps, not weights.

    More defects are synthesised in every step: what a patch of a confirmed one adds to a typical normal patch is added,
    paler or in full, to normal patches of other images. Nothing synthesised is ever scored.

    Args:
        space: of the normal patches.
        normals: (n, D) views of normal patches.
        normal_fold: (n,) the fold of each.
        defects: for each network, for each defect it may learn from, the views (k, D) of the patches that show it.
        without: for each network, the fold whose normal patches it must not see; None for all.
        seed: makes weights and draws repeatable.
        progress: told the done fraction; may raise to cancel.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        draw = torch.Generator().manual_seed(seed)
        references = torch.randn(REFERENCES, generator=draw)
        centre, spread = float(references.mean()), float(references.std())
        bag = space(normals.float().clone())
        kept = torch.stack([normal_fold != -1 if fold is None else normal_fold != fold for fold in without]).to(bag)
        sources = [[space(one.clone()) for one in of_net] for of_net in defects]
        layers = _layers(len(without), bag.shape[1], draw, bag.device)
        optimizer = torch.optim.AdamW(layers, lr=RATE, weight_decay=DECAY)
        for step in range(STEPS):
            rows, under, share = (
                torch.randint(len(bag), (NORMALS,), generator=draw),
                torch.randint(len(bag), (PASTED,), generator=draw),
                FAINTEST + (1 - FAINTEST) * torch.rand(PASTED, 1, generator=draw),
            )
            chosen = torch.randint(1 << 30, (PASTED,), generator=draw)
            picked = torch.stack([_picked(of_net, chosen) for of_net in sources])  # (F, PASTED, D)
            pasted = bag[under] + share.to(bag.device) * picked
            flat = (_scores(layers, bag[rows]) - centre) / spread  # (F, NORMALS)
            high = (_scores(layers, pasted) - centre) / spread  # (F, PASTED)
            loss = _mean(flat.abs(), kept[:, rows]) + _mean((MARGIN - high).clamp_min(0), kept[:, under])
            optimizer.zero_grad()
            torch.autograd.backward(loss.sum())
            optimizer.step()
            if step % 20 == 0:
                progress(step / STEPS, "training")
        hidden, bias, out, _ = (one.detach() for one in layers)
        shift = space.origin @ (space.into @ hidden)  # (F, H)
        return [
            Network(space.into @ weights, offset - moved, last)
            for weights, offset, moved, last in zip(hidden, bias[:, 0], shift, out[..., 0], strict=True)
        ]


def _layers(count: int, width: int, draw: torch.Generator, device: torch.device) -> list[Tensor]:
    """Return hidden weights (F, D, H) and bias (F, 1, H), and last weights (F, H, 1) and bias (F, 1, 1)."""

    def uniform(*shape: int, fan_in: int) -> Tensor:
        values = (2 * torch.rand(shape, generator=draw) - 1) / fan_in**0.5  # all start alike
        weights: Tensor = values.expand(count, *shape[1:]).clone().to(device).requires_grad_()
        return weights

    return [
        uniform(1, width, HIDDEN, fan_in=width),
        uniform(1, 1, HIDDEN, fan_in=width),
        uniform(1, HIDDEN, 1, fan_in=HIDDEN),
        uniform(1, 1, 1, fan_in=HIDDEN),
    ]


def _scores(layers: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Return each network's scores (F, n) of rows (n, D), or (F, n, D) of its own."""
    hidden, bias, out, last = layers
    active: Tensor = functional.leaky_relu(rows @ hidden + bias, SLOPE)
    scores: Tensor = active @ out + last
    return scores.squeeze(-1)


def _picked(defects: Sequence[Tensor], chosen: Tensor) -> Tensor:
    """Return a patch (n, D) for each of n random numbers, of each defect in turn."""
    sizes = torch.tensor([len(one) for one in defects])
    starts = sizes.cumsum(0) - sizes
    turn = torch.arange(len(chosen)) % len(defects)
    return torch.cat(list(defects))[starts[turn] + chosen % sizes[turn]]


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted means (F,) of values (F, n)."""
    return (values * weights).sum(1) / weights.sum(1).clamp_min(1)
