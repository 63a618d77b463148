"""The deviation head: how far patches lead from normal ones towards confirmed defects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from anomaly_workers.detectors.maps import raw_scores
from anomaly_workers.detectors.scales import Grids

SLOPE = 0.2
"""Of the network's units below 0."""

BELOW = 0.2
"""What a deviation below the head's knee counts of one above it. With nothing, an earlier head gained less from defects
that a cold start had taken for normal: magnetic_tile .891 instead of .902, pill .892 instead of .896."""

_PREFIX = "head."
_NETWORK = "network."


def views(residuals: Tensor, grids: Grids) -> Tensor:
    """Return what the head sees of each patch, (n, h, w, D).

    These are the residual, its length, the features, the features less what is typical of the image, and the wide
    surroundings, where the network has a layer for them; D = 3 d + 1 + e. With whole parts held out (no tile, no place
    of a spindle on both sides) directions of ten defects with masks took 13 % off the mean error of four classes
    without the last two, 18 % with the first of them and 27 % with both.

    Args:
        residuals: (n, h, w, d), each patch less the nearest normal one.
        grids: the features of the n images.
    """
    patches = grids.patches
    typical = patches.flatten(1, 2).median(dim=1).values[:, None, None]  # (n, 1, 1, d)
    parts = [residuals, residuals.norm(dim=-1, keepdim=True), patches, patches - typical]
    if grids.context is not None:
        wide = functional.interpolate(grids.context.permute(0, 3, 1, 2), size=grids.shape, mode="bilinear")
        parts.append(wide.permute(0, 2, 3, 1))  # (n, h, w, e)
    return torch.cat(parts, dim=-1)


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


def together(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum of two maps (n, h, w), lifted so that an image's raw score is the sum of both raw scores."""
    both = first + second
    missing = raw_scores(first) + raw_scores(second) - raw_scores(both)  # (n,), 0 or more
    return both + missing[:, None, None]


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
        """Return the scores (...) of `views` (..., D or more), up to a constant; those before saw less."""
        known = seen[..., : len(self.hidden)]
        return functional.leaky_relu(known @ self.hidden + self.bias, SLOPE) @ self.out


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
        summed: whether directions and network are added up; earlier heads took the higher of both.
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
    summed: bool = False

    def along(self, seen: Tensor) -> Tensor:
        """Return how far `views` (..., D) lead along each direction (..., k), and what the network says, if any."""
        known = seen[..., : len(self.mean)]  # the first heads saw no features
        reached = ((known - self.mean) / self.scale) @ self.directions.T
        return reached if self.network is None else torch.cat([reached, self.network(seen)[..., None]], dim=-1)

    def maps(self, seen: Tensor) -> Tensor:
        """Return the deviation (n, h, w) of each patch of `views` (n, h, w, D).

        It is that of the directions, the highest, and that of the network, added so that the image's score is the sum
        of both scores, as two judges who need not point at the same patch. With whole parts held out the errors of
        four classes fell by 33 % with the sum and by 31 % with the higher of the two, ten defects with masks.
        """
        deviations = (self.along(seen) - self.centre) / self.spread  # (n, h, w, k + 1)
        if not self.summed:
            return deviations.amax(dim=-1)
        return together(deviations[..., :-1].amax(dim=-1), deviations[..., -1])

    def added(self, maps: Tensor) -> Tensor:
        """Return what `maps` (n, h, w) add to the distances: little up to the knee, `weight` for each unit beyond.

        A deviation loss asks defects to lie beyond a margin and normal images only to stay around 0 (arXiv 1911.08623,
        section 3.4), so what a head says below its margin tells little, least of all about a defect that it was not
        shown: that one would sink below normal images that happen to deviate less than usual. With whole tiles held
        out and types left out of the shots, magnetic_tile's ranked at .837 without a knee and at .855 with it.
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
        if self.summed:
            parts["summed"] = torch.ones(1)
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
        summed = own.pop("summed", None) is not None
        layers = {name.removeprefix(_NETWORK): own.pop(name) for name in list(own) if name.startswith(_NETWORK)}
        known = Network(**layers) if layers else None
        limit = knee[0] if knee else None
        return cls(**own, weight=weight, zero=zero, knee=limit, network=known, summed=summed)
