"""PatchCore: distance to the nearest remembered patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from anomaly_workers.detectors.coreset import greedy_coreset
from anomaly_workers.detectors.neighbours import nearest, nearest_rows, square_norms
from anomaly_workers.detectors.patchwise import PatchwiseDetector
from anomaly_workers.types import Progress, no_progress

SHARE = 0.02
"""Share of all patches that the bank holds. PatchCore's smallest setting is 1 %; twice that gained 0.002 of AUROC on
held-out train/good against pool, more did not."""

FEWEST, MOST = 1000, 8000
"""Bounds on the bank: a handful of images is remembered nearly whole, thousands still search fast."""

CANDIDATES = 400_000
"""Patches the coreset is chosen among, sampled at random where there are more: 400 images of 256 x 256 pixels have them
all. Rare normal patches decide how well the bank covers; choosing among a tenth of all cost 0.01 of AUROC."""


@dataclass(frozen=True, slots=True)
class Bank:
    """Patches that cover all normal ones.

    Attributes:
        patches: (m, d).
        norms: (m,) squared norms of the patches.
        sources: (m,) the learnt grid that each patch is from.
    """

    patches: Tensor
    norms: Tensor
    sources: Tensor

    @classmethod
    def learn(cls, grids: Sequence[Tensor], *, seed: int, progress: Progress = no_progress) -> Self:
        """Choose a coreset of all patches of the grids (h, w, d)."""
        rows = torch.cat([grid.flatten(0, 1) for grid in grids])  # (n, d)
        count = min(max(int(SHARE * len(rows)), FEWEST), MOST, len(rows))
        chosen = greedy_coreset(rows, count, seed=seed, candidates=CANDIDATES, progress=progress)
        patches = rows[chosen]
        counts = torch.tensor([grid.shape[0] * grid.shape[1] for grid in grids], device=rows.device)
        sources = torch.repeat_interleave(torch.arange(len(grids), device=rows.device), counts)[chosen]
        return cls(patches, square_norms(patches), sources)

    def distances(self, grids: Tensor, *, without: Sequence[tuple[int, ...]] = ()) -> Tensor:
        """Return each patch's distance (n, h, w) to the nearest of the bank, less what is from the grids `without`."""
        if not any(without):
            return nearest(grids.flatten(0, 2), self.patches, norms=self.norms).view(grids.shape[:3])
        found = [
            nearest(grid.flatten(0, 1), self.patches, norms=self._norms_without(left_out))
            for grid, left_out in zip(grids, without, strict=True)
        ]
        return torch.stack(found).view(grids.shape[:3])

    def _norms_without(self, left_out: tuple[int, ...]) -> Tensor:
        """Move the patches of some grids infinitely far away, unless there are no others."""
        gone = torch.isin(self.sources, torch.tensor(left_out, dtype=self.sources.dtype, device=self.sources.device))
        return self.norms if bool(gone.all()) else self.norms.masked_fill(gone, float("inf"))

    def looked_up(self, grids: Tensor, *, without: Sequence[tuple[int, ...]] = ()) -> tuple[Tensor, Tensor]:
        """Return `distances` and each patch of (n, h, w, d) less the nearest of the bank, from one search."""
        left_out = without if any(without) else [()] * len(grids)
        found = []
        for grid, places in zip(grids, left_out, strict=True):
            norms = self._norms_without(places) if places else self.norms
            rows = nearest_rows(grid.flatten(0, 1), self.patches, norms=norms)
            found.append(grid - self.patches[rows].view(grid.shape))
        residuals = torch.stack(found)
        return residuals.norm(dim=-1), residuals

    def plus(self, patches: Tensor) -> Self:
        """Return a bank that holds patches (k, d) too; no learnt grid is their source."""
        rows = torch.cat([self.patches, patches])
        sources = torch.cat([self.sources, self.sources.new_full((len(patches),), -1)])
        return type(self)(rows, square_norms(rows), sources)

    def is_nearer(self, rows: Tensor, patches: Tensor) -> bool:
        """Tell whether one of rows (n, d) is nearer to patches (k, d) than to the bank."""
        return bool((nearest(rows, patches) < nearest(rows, self.patches, norms=self.norms)).any())

    def state(self) -> dict[str, Tensor]:
        """Return the bank's tensors."""
        return {"patches": self.patches, "sources": self.sources}

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        """Rebuild from `state`."""
        return cls(state["patches"], square_norms(state["patches"]), state["sources"])


class PatchCore(PatchwiseDetector):
    """PatchCore (Roth et al., arXiv 2106.08265) with a coreset chosen from a sample and a top-share score.

    Left out: the paper's re-weighting by neighbours' density (section 3.3), which the averaged score replaces.
    """

    memory_type = Bank
