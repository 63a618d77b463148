"""The deviation head: how far patches lead from normal ones towards confirmed defects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_PREFIX = "head."


def views(residuals: Tensor) -> Tensor:
    """Return what the head sees of each patch: (n, h, w, d + 1), the residual and its length.

    The features themselves are left out: they tell normal images apart, and a head learns which of them were there. On
    training images held out in runs of neighbours, with ten defects, they undid the gain on magnetic_tile (-28 % errors
    with residuals alone, +3 % with features) that a random split had promised.

    Args:
        residuals: (n, h, w, d), each patch less the nearest normal one.
    """
    return torch.cat([residuals, residuals.norm(dim=-1, keepdim=True)], dim=-1)


@dataclass(frozen=True, slots=True)
class Head:
    """One direction for each confirmed defect, in units of what normal images reach along it.

    The deviation of Pang, Shen and van den Hengel (arXiv 1911.08623, section 3.3) is a score's distance from the mean
    of reference scores in their standard deviations; here the references are the normal images themselves.

    Attributes:
        mean: (D,) of normal patches.
        scale: (D,) their standard deviation.
        directions: (k, D) of standardised views.
        centre: (k,) mean of the normal images' scores along each direction.
        spread: (k,) their standard deviation.
        weight: the map's share of it in the joint one, in distances: added to them after multiplication with this.
        zero: mean of the normal images' scores, subtracted from the map.
    """

    mean: Tensor
    scale: Tensor
    directions: Tensor
    centre: Tensor
    spread: Tensor
    weight: float = 0.0
    zero: float = 0.0

    def maps(self, seen: Tensor) -> Tensor:
        """Return the deviation (n, h, w) of each patch of `views` (n, h, w, D): the highest of all directions."""
        along = ((seen - self.mean) / self.scale) @ self.directions.T  # (n, h, w, k)
        return ((along - self.centre) / self.spread).amax(dim=-1)

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that `restore` needs."""
        numbers = torch.tensor([self.weight, self.zero], dtype=torch.float64)
        parts = {"mean": self.mean, "scale": self.scale, "directions": self.directions, "centre": self.centre}
        return {_PREFIX + name: tensor for name, tensor in (parts | {"spread": self.spread, "fusion": numbers}).items()}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self | None:
        """Rebuild from `state`; None where there is no head in it."""
        own = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
        if not own:
            return None
        weight, zero = own.pop("fusion").tolist()
        return cls(**own, weight=weight, zero=zero)
