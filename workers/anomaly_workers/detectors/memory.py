"""What a method remembers of normal patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

from torch import Tensor

from anomaly_workers.types import Progress, no_progress


class Memory(Protocol):
    """What is remembered of normal patches: the part in which methods differ."""

    @classmethod
    def learn(cls, grids: Sequence[Tensor], *, seed: int, progress: Progress = no_progress) -> Self:
        """Remember grids (h, w, d), not all of one shape."""

    def distances(self, grids: Tensor, *, without: Sequence[tuple[int, ...]] = ()) -> Tensor:
        """Return how far each patch of (n, h, w, d) is from normal, as (n, h, w).

        `without` names, for each of the n, the learnt grids that must not speak for it, where the method can tell.
        """

    def looked_up(self, grids: Tensor, *, without: Sequence[tuple[int, ...]] = ()) -> tuple[Tensor, Tensor]:
        """Return `distances` and each patch of (n, h, w, d) less the nearest normal one, from one search.

        Raises:
            ConfigError: the method remembers no patches.
        """

    def plus(self, patches: Tensor) -> Self:
        """Return a memory that takes patches (k, d) as normal too, or itself where the method cannot."""

    def is_nearer(self, rows: Tensor, patches: Tensor) -> bool:
        """Tell whether `plus` with patches (k, d) would bring one of rows (n, d) nearer to normal."""

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that `restore` needs."""

    @classmethod
    def restore(cls, state: dict[str, Tensor]) -> Self:
        """Rebuild from `state`'s tensors."""
