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
"""Deviation that a defect's patch has to reach. The loss matters: with cross-entropy instead of it the same network
took 23 % off the errors of four classes with whole parts held out, with it 33 %."""

HIDDEN, STEPS, RATE, DECAY, DROPPED = 32, 300, 2e-3, 1e-2, 0.2
"""Units, steps, highest learning rate (it rises and falls once), weight decay, share of the units dropped in a step."""

NORMALS, PASTED = 512, 256
"""Normal and defective patches in each step; every confirmed defect has an equal share of the latter."""

FAINTEST = 0.5
"""Synthesised defects have this share, or up to all, of what a confirmed one adds to a typical normal patch. With
whole parts held out the network alone ranked magnetic_tile at .759 so and at .706 with the confirmed patches as they
are, pill at .942 and .903; half of either: .752 and .939."""


class Space:
    """Standardises the views of patches.

    Whitened as well, as for the directions, the network learns what hardly varies and ranks worse on parts that it has
    not seen: solar_cell .928 instead of .955, pill .902 instead of .947, magnetic_tile .767 instead of .779.

    Args:
        mean: (D,) of normal patches.
        scale: (D,) their standard deviation.
    """

    def __init__(self, mean: Tensor, scale: Tensor) -> None:
        self.origin, self.scale = mean, scale

    def __call__(self, seen: Tensor) -> Tensor:
        """Return views (n, D) as (n, D) values around 0."""
        return (seen - self.origin) / self.scale


def train(
    space: Space,
    normals: Tensor,
    normal_fold: Tensor,
    defects: Sequence[Sequence[Tensor]],
    without: Sequence[int | None],
    *,
    made: Sequence[Tensor] = (),
    made_fold: Sequence[int] = (),
    seed: int,
    progress: Progress = no_progress,
) -> list[Network]:
    """Train one network for each of F left out folds; they share normal patches and steps, not weights.

    More defects are synthesised in every step: what a patch of a confirmed one adds to a typical normal patch is added,
    paler or in full, to normal patches of other images. Half of the defects are made-up ones, where there are some.
    Nothing synthesised is ever scored.

    Args:
        space: of the normal patches.
        normals: (n, D) views of normal patches.
        normal_fold: (n,) the fold of each.
        defects: for each network, for each defect it may learn from, the views (k, D) of the patches that show it.
        without: for each network, the fold whose normal patches it must not see; None for all.
        made: views (k, D) of the patches of each made-up defect.
        made_fold: of each, the fold of the normal image behind it.
        seed: makes weights and draws repeatable.
        progress: told the done fraction; may raise to cancel.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        draw = torch.Generator().manual_seed(seed)
        references = torch.randn(REFERENCES, generator=draw)
        centre, spread = float(references.mean()), float(references.std())
        bag = space(normals.float().clone())
        kept = torch.stack([normal_fold != -1 if fold is None else normal_fold != fold for fold in without]).to(bag)
        sources = [_Pool([space(one.clone()) for one in of_net]) for of_net in defects]
        others = _Pool([space(one.float().clone()) for one in made]) if made else None
        allowed = torch.tensor([[at != fold for at in made_fold] for fold in without]).to(bag)  # (F, made)
        layers = _layers(len(without), bag.shape[1], draw, bag.device)
        optimizer = torch.optim.AdamW(layers, lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
        for step in range(STEPS):
            rows = torch.randint(len(bag), (NORMALS,), generator=draw)
            shown, known = _defective(bag, kept, sources, others, allowed, draw)
            flat = (_scores(layers, bag[rows], _kept_units(NORMALS, draw)) - centre) / spread  # (F, NORMALS)
            high = (_scores(layers, shown, _kept_units(PASTED, draw)) - centre) / spread  # (F, PASTED)
            loss = _mean(flat.abs(), kept[:, rows]) + _mean((MARGIN - high).clamp_min(0), known)
            optimizer.zero_grad()
            torch.autograd.backward(loss.sum())
            optimizer.step()
            schedule.step()
            if step % 20 == 0:
                progress(step / STEPS, "training")
        hidden, bias, out, _ = (one.detach() for one in layers)
        hidden = hidden / space.scale[:, None]  # (F, D, H), from views as they come
        return [
            Network(weights, offset - space.origin @ weights, last)
            for weights, offset, last in zip(hidden, bias[:, 0], out[..., 0], strict=True)
        ]


def _defective(
    bag: Tensor, kept: Tensor, sources: Sequence[_Pool], others: _Pool | None, allowed: Tensor, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw a step's defective patches (F, PASTED, D), and which of them each network may see (F, PASTED)."""
    confirmed = PASTED - (PASTED // 2 if others else 0)
    under = torch.randint(len(bag), (confirmed,), generator=draw)
    share = FAINTEST + (1 - FAINTEST) * torch.rand(confirmed, 1, generator=draw)
    chosen = torch.randint(1 << 30, (PASTED,), generator=draw)
    mine = torch.arange(confirmed)
    picked = torch.stack([pool.drawn(chosen[:confirmed], mine % len(pool)) for pool in sources])
    shown, known = bag[under] + share.to(bag.device) * picked, kept[:, under]  # (F, confirmed, D)
    if others:
        turn = torch.randint(len(others), (PASTED - confirmed,), generator=draw)
        more = others.drawn(chosen[confirmed:], turn)  # (PASTED - confirmed, D)
        shown = torch.cat([shown, more.expand(len(shown), -1, -1)], dim=1)
        known = torch.cat([known, allowed[:, turn]], dim=1)
    return shown, known


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


def _kept_units(count: int, draw: torch.Generator) -> Tensor:
    """Return factors (count, H): 0 for the units that each row does without, the same for every network."""
    return (torch.rand(count, HIDDEN, generator=draw) >= DROPPED).float() / (1 - DROPPED)


def _scores(layers: Sequence[Tensor], rows: Tensor, kept: Tensor) -> Tensor:
    """Return each network's scores (F, n) of rows (n, D), or (F, n, D) of its own, with the units kept (n, H)."""
    hidden, bias, out, last = layers
    active: Tensor = functional.leaky_relu(rows @ hidden + bias, SLOPE) * kept.to(rows.device)
    scores: Tensor = active @ out + last
    return scores.squeeze(-1)


class _Pool:
    """Patches of k defects, (n, D) together, to be drawn defect by defect."""

    def __init__(self, defects: Sequence[Tensor]) -> None:
        self._rows = torch.cat(list(defects))
        self._sizes = torch.tensor([len(one) for one in defects])
        self._starts = self._sizes.cumsum(0) - self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def drawn(self, chosen: Tensor, turn: Tensor) -> Tensor:
        """Return a patch (m, D) of the defect that each of `turn` (m,) names, by a random number for each."""
        return self._rows[self._starts[turn] + chosen % self._sizes[turn]]


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted means (F,) of values (F, n)."""
    return (values * weights).sum(1) / weights.sum(1).clamp_min(1)
