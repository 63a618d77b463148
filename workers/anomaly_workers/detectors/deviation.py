"""The deviation head: how far patches lead from normal ones towards confirmed defects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from anomaly_workers.detectors.maps import raw_scores

SLOPE = 0.2
"""Of the network's units below 0."""

BELOW = 0.2
"""What a deviation below the head's knee counts of one above it. With nothing, hidden defects that a cold start takes
for normal gain less from the head: magnetic_tile .891 instead of .902, pill .892 instead of .896."""

_PREFIX = "head."
_NETWORK = "network."


def views(residuals: Tensor, grids: Tensor) -> Tensor:
    """Return what the head sees of each patch: (n, h, w, 2 d + 1), the residual, its length and the features.

    With whole parts held out (no tile, no place of a spindle on both sides) ten defects with masks took 34 % off the
    errors with the features and 28 % without, the mean of five classes.

    Args:
        residuals: (n, h, w, d), each patch less the nearest normal one.
        grids: (n, h, w, d) patch features.
    """
    return torch.cat([residuals, residuals.norm(dim=-1, keepdim=True), grids], dim=-1)


def fused(distances: Tensor, deviations: Tensor) -> Tensor:
    """Return the sum of both maps (n, h, w), stretched so that an image's raw score is the sum of both raw scores.

    Bank and head need not agree on the place to agree on the image: adding scores rather than maps took 7 points more
    off the validated errors. The sum of two scores is never below the score of the sum, so that maps only grow, and
    stretched they grow least where nothing is.

    Args:
        distances: (n, h, w) of the memory.
        deviations: (n, h, w) of the head, in the same unit, 0 where a normal image's score is.
    """
    both = distances + deviations
    reached = raw_scores(both)
    missing = raw_scores(distances) + raw_scores(deviations) - reached  # (n,), 0 or more
    factor = torch.where(reached > 0, 1 + missing / reached.clamp_min(1e-9), torch.ones_like(reached))
    offset = torch.where(reached > 0, torch.zeros_like(missing), missing)
    return both * factor[:, None, None] + offset[:, None, None]


@dataclass(frozen=True, slots=True)
class Network:
    """A deviation network with one hidden layer, for each patch.

    Attributes:
        hidden: (D, H) from views.
        bias: (H,) added to it.
        out: (H,) from the hidden units, leaky below 0, to the score.
    """

    hidden: Tensor
    bias: Tensor
    out: Tensor

    def __call__(self, seen: Tensor) -> Tensor:
        """Return the scores (...) of `views` (..., D), up to a constant."""
        return functional.leaky_relu(seen @ self.hidden + self.bias, SLOPE) @ self.out


@dataclass(frozen=True, slots=True)
class Head:
    """A direction for each confirmed defect and a deviation network, in units of what normal images reach along them.

    The deviation of Pang, Shen and van den Hengel (arXiv 1911.08623, section 3.3) is a score's distance from the mean
    of reference scores in their standard deviations. The network is trained with references from a normal distribution
    as there; what it then says is measured, like the directions, by the scores of the normal images themselves.

    Attributes:
        mean: (D,) of normal patches.
        scale: (D,) their standard deviation.
        directions: (k, D) of standardised views.
        centre: (k,), or (k + 1,) with a network, mean of the normal images' scores along each direction.
        spread: the same of their standard deviation.
        weight: distances for each unit of the map.
        zero: mean of the normal images' scores, subtracted from the map.
        knee: deviation, less `zero`, up to which normal images reach; None in heads stored before there was one.
        network: None in the first heads, which had none.
    """

    mean: Tensor
    scale: Tensor
    directions: Tensor
    centre: Tensor
    spread: Tensor
    weight: float = 0.0
    zero: float = 0.0
    knee: float | None = None
    network: Network | None = None

    def along(self, seen: Tensor) -> Tensor:
        """Return how far `views` (..., D) lead along each direction (..., k), and what the network says, if any."""
        known = seen[..., : len(self.mean)]  # the first heads saw no features
        reached = ((known - self.mean) / self.scale) @ self.directions.T
        return reached if self.network is None else torch.cat([reached, self.network(seen)[..., None]], dim=-1)

    def maps(self, seen: Tensor) -> Tensor:
        """Return the deviation (n, h, w) of each patch of `views` (n, h, w, D): the highest of directions and network.

        With whole tiles and positions held out the higher of both is above the directions alone at every weight, and
        with masks most: magnetic_tile .886 to .899 at weight .6, ball_screw .821 to .827.
        """
        return ((self.along(seen) - self.centre) / self.spread).amax(dim=-1)

    def added(self, maps: Tensor) -> Tensor:
        """Return what `maps` (n, h, w) add to the distances: little up to the knee, `weight` for each unit beyond.

        A deviation loss asks defects to lie beyond a margin and normal images only to stay around 0 (arXiv 1911.08623,
        section 3.4), so what a head says below its margin tells little, least of all about a defect that it was not
        shown: that one would sink below normal images that happen to deviate a little. With whole tiles held out and
        a type of defect left out of the shots, magnetic_tile fell from .859 to .846 (masks) and .839 (verdicts)
        without a knee, and is at .864 and .856 with it.
        """
        deviations = maps - self.zero
        if self.knee is None:
            return self.weight * deviations
        low = deviations.clamp_max(self.knee)
        return self.weight * (BELOW * low + (deviations - low))

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that `restore` needs."""
        knee = () if self.knee is None else (self.knee,)
        numbers = torch.tensor([self.weight, self.zero, *knee], dtype=torch.float64)
        parts = {"mean": self.mean, "scale": self.scale, "directions": self.directions, "centre": self.centre}
        parts |= {"spread": self.spread, "fusion": numbers}
        if self.network is not None:
            net = self.network
            parts |= {_NETWORK + "hidden": net.hidden, _NETWORK + "bias": net.bias, _NETWORK + "out": net.out}
        return {_PREFIX + name: tensor for name, tensor in parts.items()}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self | None:
        """Rebuild from `state`; None where there is no head in it."""
        own = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
        if not own:
            return None
        weight, zero, *knee = own.pop("fusion").tolist()
        layers = {name.removeprefix(_NETWORK): own.pop(name) for name in list(own) if name.startswith(_NETWORK)}
        known = Network(**layers) if layers else None
        return cls(**own, weight=weight, zero=zero, knee=knee[0] if knee else None, network=known)
