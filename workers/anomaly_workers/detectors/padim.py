"""PaDiM: a Gaussian of normal features at each place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from anomaly_workers.detectors.patchwise import PatchwiseDetector
from anomaly_workers.errors import ConfigError
from anomaly_workers.types import Progress, no_progress

DIMENSIONS = 100
"""Features kept, drawn at random: as good as principal components (PaDiM, section IV-A)."""

REGULARISATION = 0.01
"""Added to the covariance's diagonal (PaDiM, section III-B), as a share of the mean variance."""


LEAST_SHRINK = 1e-4
"""Bound of `_left_out`: with fewer images than features it would be rounding that decides."""


@dataclass(frozen=True, slots=True)
class Gaussians:
    """One Gaussian for each place of a grid.

    Attributes:
        mean: (h, w, k).
        whitening: (h, w, k, k), the inverse Cholesky factor of the covariance.
        chosen: (k,) indices of the features in use.
        count: how many grids they were learnt from.
    """

    mean: Tensor
    whitening: Tensor
    chosen: Tensor
    count: int

    @classmethod
    def learn(cls, grids: Sequence[Tensor], *, seed: int, progress: Progress = no_progress) -> Self:
        """Fit to grids (h, w, d); those of another shape are interpolated to the commonest."""
        shape = Counter(tuple(grid.shape[:2]) for grid in grids).most_common(1)[0][0]
        width = grids[0].shape[2]
        chosen = torch.randperm(width, generator=torch.Generator().manual_seed(seed))[:DIMENSIONS].sort().values
        chosen = chosen.to(grids[0].device)
        stack = torch.stack([_regridded(grid[None, :, :, chosen], shape)[0] for grid in grids])  # (n, h, w, k)
        mean = stack.mean(dim=0)
        whitening = torch.empty(*shape, len(chosen), len(chosen), device=mean.device)
        for row in range(shape[0]):
            whitening[row] = _whitening(stack[:, row] - mean[row])
            progress((row + 1) / shape[0], "fitting Gaussians")
        return cls(mean, whitening, chosen, len(grids))

    def distances(self, grids: Tensor, *, without: Sequence[tuple[int, ...]] = ()) -> Tensor:
        """Return each patch's Mahalanobis distance (n, h, w) to the normal patches of its place.

        A grid that was learnt from is taken out of its own Gaussians, see `_left_out`.
        """
        shape = (self.mean.shape[0], self.mean.shape[1])
        centred = _regridded(grids[..., self.chosen], shape) - self.mean  # (n, h, w, k)
        places = centred.flatten(1, 2).permute(1, 2, 0)  # (h * w, k, n)
        white = torch.bmm(self.whitening.flatten(0, 1), places)  # (h * w, k, n)
        squares = white.square().sum(dim=1).T.reshape(len(grids), *shape)
        learnt = [index for index, places in enumerate(without) if places]
        squares[learnt] = _left_out(squares[learnt], self.count)
        distances = squares.sqrt()
        if shape == tuple(grids.shape[1:3]):
            return distances
        size = (grids.shape[1], grids.shape[2])
        return functional.interpolate(distances[:, None], size=size, mode="bilinear")[:, 0]

    def looked_up(self, grids: Tensor, *, without: Sequence[tuple[int, ...]] = ()) -> tuple[Tensor, Tensor]:
        """Refuse: no normal patch is remembered whole.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("PaDiM cannot learn from defects. Set ANOMALY_DETECTOR to patchcore-padim or patchcore.")

    def plus(self, patches: Tensor) -> Self:
        """Return itself: a few patches say nothing of a place's Gaussian."""
        return self

    def is_nearer(self, rows: Tensor, patches: Tensor) -> bool:
        """Return False: `plus` changes nothing."""
        return False

    def state(self) -> dict[str, Tensor]:
        """Return the Gaussians' tensors."""
        count = torch.tensor(self.count)
        return {"mean": self.mean, "whitening": self.whitening, "chosen": self.chosen, "count": count}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        """Rebuild from `state`."""
        return cls(state["mean"], state["whitening"], state["chosen"], int(state["count"]))


class Padim(PatchwiseDetector):
    """PaDiM (Defard et al., arXiv 2011.08785): Mahalanobis distance to a Gaussian for each place of the image."""

    memory_type = Gaussians
    learns_defects = False


def _left_out(squares: Tensor, count: int) -> Tensor:
    """Return squared distances of learnt patches to the Gaussians of the `count` - 1 other grids.

    By Sherman and Morrison: without v the covariance C becomes C - a vv' with a = n / (n - 1)², so that q = v'C⁻¹v
    becomes q / (1 - aq), and v itself grows by n / (n - 1) as the mean moves away. C keeps its divisor and ridge.
    """
    if count < 2:
        return squares
    shrink = (1 - count / (count - 1) ** 2 * squares).clamp_min(LEAST_SHRINK)
    return squares / shrink * (count / (count - 1)) ** 2


def _whitening(centred: Tensor) -> Tensor:
    """Return inverse Cholesky factors (w, k, k) of the covariances of centred features (n, w, k)."""
    n, _, k = centred.shape
    covariance = torch.einsum("nwi,nwj->wij", centred, centred) / max(1, n - 1)
    trace = covariance.diagonal(dim1=1, dim2=2).mean()
    eye = torch.eye(k, device=centred.device)
    factor = torch.linalg.cholesky(covariance + (REGULARISATION * trace + 1e-6) * eye)
    inverse: Tensor = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    return inverse


def _regridded(grids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Interpolate (n, h, w, k) to another (h, w)."""
    if tuple(grids.shape[1:3]) == shape:
        return grids
    moved = grids.permute(0, 3, 1, 2)
    resized: Tensor = functional.interpolate(moved, size=(shape[0], shape[1]), mode="bilinear")
    return resized.permute(0, 2, 3, 1)
