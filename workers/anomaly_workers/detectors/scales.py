"""Two scales of a picture: its patches, and the wide surroundings that a deep layer sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from anomaly_workers.detectors.maps import raw_scores
from anomaly_workers.detectors.memory import Memory
from anomaly_workers.types import Progress, no_progress

CONTEXT = 0.2
"""Exponent of the surroundings' distance. A quarter of a picture that looks odd as a whole (a missing part, uneven
material) has patches that are each at home somewhere. Mean image AUROC on train/good and pool/ of four classes with
whole parts, tiles and positions held out: .883 without, .886 with 0.15, .885 with 0.25, .883 with 0.35, .877 with 0.5.
Most of it is magnetic_tile's, .844 to .868 with 0.25; ball_screw lost .813 to .797."""

LOOKED_AT = 16
"""Learnt pictures in which the two distances are compared, or all where there are fewer."""

_PREFIX = "context."


@dataclass(frozen=True, slots=True, eq=False)
class Grids:
    """Features of n equally shaped pictures.

    Attributes:
        patches: (n, h, w, d) locally averaged features of the middle layers, at stride 8 for most networks.
        context: (n, h', w', e) of the layer at stride 32; None where the network has none.
    """

    patches: Tensor
    context: Tensor | None = None

    def __len__(self) -> int:
        """Return n."""
        return len(self.patches)

    def one(self, index: int) -> Grids:
        """Return those of one picture, n = 1."""
        part = slice(index, index + 1)
        return Grids(self.patches[part], None if self.context is None else self.context[part])

    def half(self) -> Grids:
        """Return them in half precision, to keep many in memory."""
        return Grids(self.patches.half(), None if self.context is None else self.context.half())

    def float(self) -> Grids:
        """Return them in single precision."""
        return Grids(self.patches.float(), None if self.context is None else self.context.float())

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.patches.shape[1], self.patches.shape[2]

    @property
    def device(self) -> torch.device:
        """Where the features live."""
        return self.patches.device


@dataclass(frozen=True, slots=True)
class Scales:
    """What is remembered at both scales.

    Attributes:
        patches: of the patches.
        context: of the surroundings; None where the method or the network has none.
        unit: the surroundings' distance, for one of the patches', in a typical normal picture.
    """

    patches: Memory
    context: Memory | None = None
    unit: float = 1.0

    @classmethod
    def learn(
        cls,
        patches: type[Memory],
        context: type[Memory] | None,
        grids: Sequence[Grids],
        *,
        seed: int,
        progress: Progress = no_progress,
    ) -> Self:
        """Remember normal pictures, each with n = 1, in a memory of each type."""
        wide = [one.context[0] for one in grids if one.context is not None]
        far = context.learn(wide, seed=seed) if context and len(wide) == len(grids) else None
        near = patches.learn([one.patches[0] for one in grids], seed=seed, progress=progress)
        return cls(near, far, _unit(near, far, grids) if far else 1.0)

    def distances(self, grids: Grids, *, without: Sequence[tuple[int, ...]] = ()) -> Tensor:
        """Return how far each patch is from normal, as (n, h, w).

        A picture's raw score is that of the weighted geometric mean of both scales; the places are those of the
        patches alone, because a cell of the surroundings sees a defect from far away.

        `without` names, for each of the n, the learnt pictures that must not speak for it.
        """
        return self._joined(self.patches.distances(grids.patches, without=without), grids, without)

    def looked_up(self, grids: Grids, *, without: Sequence[tuple[int, ...]] = ()) -> tuple[Tensor, Tensor]:
        """Return `distances` and each patch less the nearest normal one (n, h, w, d), from one search.

        Raises:
            ConfigError: the method remembers no patches.
        """
        near, residuals = self.patches.looked_up(grids.patches, without=without)
        return self._joined(near, grids, without), residuals

    def _joined(self, near: Tensor, grids: Grids, without: Sequence[tuple[int, ...]]) -> Tensor:
        if self.context is None or grids.context is None:
            return near
        far = self.context.distances(grids.context, without=without)
        far = functional.interpolate(far[:, None], size=grids.shape, mode="bilinear")[:, 0] / self.unit
        return _stretched(near, raw_scores(near ** (1 - CONTEXT) * far**CONTEXT))

    def plus(self, patches: Tensor) -> Self:
        """Return a memory that takes patches (k, d) as normal too: at distance 0 whatever surrounds them."""
        return replace(self, patches=self.patches.plus(patches))

    def is_nearer(self, rows: Tensor, patches: Tensor) -> bool:
        """Tell whether `plus` with patches (k, d) would bring one of rows (n, d) nearer to normal."""
        return self.patches.is_nearer(rows, patches)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that `restore` needs."""
        wide = self.context.state() | {"unit": torch.tensor(self.unit)} if self.context else {}
        return self.patches.state() | {_PREFIX + name: tensor for name, tensor in wide.items()}

    @classmethod
    def restore(cls, patches: type[Memory], context: type[Memory] | None, state: dict[str, Tensor]) -> Self:
        """Rebuild from `state`; one that was saved without context has none."""
        wide = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
        if not context or not wide:
            return cls(patches.restore(state))
        return cls(patches.restore(state), context.restore(wide), float(wide["unit"]))


def _unit(near: Memory, far: Memory, grids: Sequence[Grids]) -> float:
    """Return the ratio of both distances in some of the learnt pictures, each without its own patches."""
    ratios = []
    for place in range(0, len(grids), max(1, len(grids) // LOOKED_AT)):
        one, own = grids[place], [(place,)]
        if one.context is not None:
            wide = far.distances(one.context, without=own).median()
            ratios.append(float(wide / near.distances(one.patches, without=own).median().clamp_min(1e-9)))
    return float(np.median(ratios)) or 1.0


def _stretched(maps: Tensor, scores: Tensor) -> Tensor:
    """Stretch maps (n, h, w) away from their medians so that their raw scores become `scores` (n,).

    What is typical of a picture stays as it is: multiplied, a score that rises much would lift all of it.
    """
    reached, level = raw_scores(maps), maps.flatten(1).median(dim=1).values  # (n,)
    level = torch.where(torch.minimum(reached, scores) > level, level, torch.zeros_like(level))
    factor = (scores - level) / (reached - level).clamp_min(1e-9)
    return (level[:, None, None] + factor[:, None, None] * (maps - level[:, None, None])).clamp_min(0)
