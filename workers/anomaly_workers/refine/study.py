"""Training of the deviation head, with cross-validation over the confirmed images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from anomaly_workers.detectors.deviation import Head, fused, together, views
from anomaly_workers.detectors.maps import raw_scores
from anomaly_workers.detectors.parallel import each
from anomaly_workers.detectors.scales import Grids, Scales
from anomaly_workers.refine import network
from anomaly_workers.refine.synthetic import synthesised
from anomaly_workers.types import Picture, Progress, no_progress

FOLDS = 5
"""At most; as many as there are defects where they are fewer. Normal images are dealt one by one, as the bank holds
them out. Where neighbours stayed together the head alone did without them, and the gate kept back heads that ranked
new parts better: ball_screw .985 against the bank's .959, solar_cell .956 against .935."""

RIDGE = 0.1
"""Added to the diagonal of the covariance of standardised normal patches. With whole parts held out four classes ranked
at .904, .909 and .914 with 1, .3 and .1, bank and directions together; .03 was no better."""

OWN = 0.8
"""Share of a defect's own patches in its direction; the rest is the mean of all defects."""

POSITIVE = 0.03
"""Share of an image's patches that a defect without a mask is taken to have, those farthest from normal."""

MOST, PATCHES = 20, 60
"""Patches of a defect with a mask, or a synthesised one, that its direction and that the network are made of, at most;
the farthest from normal ones inside."""

BAG = 200
"""Patches of each normal image that the head is trained against: half of them the farthest from normal ones."""

INVENTED = 240
"""Synthesised defects that the network is trained on beside the confirmed ones. With whole parts held out the head
alone ranked magnetic_tile at .843 with them and .814 without, types left out of the shots at .821 and .797; solar_cell
at .943 and .950, ball_screw at .972 and .971. With half as many types left out ranked a little lower."""

WEIGHT, HALF = 1.0, 3
"""A standard deviation of the head's image score counts WEIGHT * n / (n + HALF) of one of the bank's for n defects,
beyond the knee. With whole parts held out and ten defects with masks, .3, .5, 1 and 1.5 took 15, 19, 30 and 31 % off
the errors of four classes, and added 11, 18, 26 and 30 % to those of magnetic_tile's types left out of the ten (one or
two draws)."""

UNDRAWN = 1 / 2
"""What a defect without a mask counts of one with: which patches show it is a guess."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A confirmed defect.

    Attributes:
        grid: the image's features, n = 1.
        inside: (h, w) share of each cell inside the annotators' mask; None where nobody drew.
    """

    grid: Grids = field(repr=False)
    inside: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Invented:
    """A synthesised defect: it is trained on, never scored.

    Attributes:
        grid: the changed image's features, n = 1.
        inside: (h, w) share of each cell that was changed.
        origin: place of the normal image that it was made of.
    """

    grid: Grids = field(repr=False)
    inside: Tensor = field(repr=False)
    origin: int


@dataclass(frozen=True, slots=True)
class Study:
    """A trained head and how it does on images it was not trained on.

    Attributes:
        head: trained on everything.
        normals: (n,) raw scores of the normal images, each by a head that has not seen it.
        normals_before: (n,) the same without a head.
        normals_alone: (n,) raw scores of the head alone.
        lessons: (k,) raw scores of the defects, each by a head that has not seen it.
        lessons_before: (k,) the same without a head.
    """

    head: Head
    normals: NDArray[np.float64]
    normals_before: NDArray[np.float64]
    normals_alone: NDArray[np.float64]
    lessons: NDArray[np.float64]
    lessons_before: NDArray[np.float64]


def study(
    memory: Scales,
    normals: Sequence[Grids],
    lessons: Sequence[Lesson],
    *,
    invented: Sequence[Invented] = (),
    weight: float = WEIGHT,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Study:
    """Train a head on what was learnt as normal and on confirmed defects, and cross-validate it.

    Each defect is a direction in which the normal patches vary little: a linear discriminant between patches of the
    normal images and the defect's own. A normal patch is seen relative to what the other images remember, so that its
    residual is no smaller than a new image's would be. A defect without a mask is where the bank's distance is highest,
    the top K of multiple-instance learning (arXiv 2108.00462, section 3.2). On the same patches, and those of
    synthesised defects, a deviation network is trained, see `network.train`.

    Args:
        memory: what was fitted on `normals`.
        normals: what was learnt, each with n = 1, in that order.
        lessons: at least one.
        invented: from `invent`; none is fine.
        weight: 0 or more, how much the head counts beside the bank, see `WEIGHT`.
        seed: makes the folds repeatable.
        progress: told the done fraction; may raise to cancel.
    """
    with torch.inference_mode():
        seen = _Seen(memory, normals, lessons, invented, weight=weight, seed=seed, progress=_part(progress, 0.0, 0.5))
        folds = range(seen.folds)
        left_out = [*(folds if seen.folds > 1 else []), None]
        trained = seen.heads(left_out, seed=seed, progress=_part(progress, 0.5, 0.8))
        scaled = seen.scaled(trained, progress=_part(progress, 0.8, 0.95))
        *heads, whole = [head for head, _, _ in scaled]
        by_fold = heads or [whole]  # a single defect cannot be held out: its head is never judged
        places = [seen.normal_fold[index] if heads else -1 for index in range(len(normals))]
        normal_scores = np.array([scaled[place][1][index] for index, place in enumerate(places)])
        normal_alone = np.array([scaled[place][2][index] for index, place in enumerate(places)])
        lesson_scores = [
            seen.lesson_score(index, by_fold[seen.lesson_fold[index] if heads else 0]) for index in range(len(lessons))
        ]
        progress(1.0, "trained")
    return Study(
        head=whole,
        normals=normal_scores,
        normals_before=np.array(seen.normals_before),
        normals_alone=normal_alone,
        lessons=np.array([score for score, _ in lesson_scores]),
        lessons_before=np.array([before for _, before in lesson_scores]),
    )


def invent(
    grids: Callable[[Sequence[Picture]], Sequence[Grids]], pictures: Sequence[Picture], *, seed: int = 0
) -> list[Invented]:
    """Synthesise defects on normal images.

    Args:
        grids: gives pictures' features, each n = 1.
        pictures: of the normal images that a study is told of, in that order.
        seed: of all draws.
    """
    made = synthesised(pictures, INVENTED, seed=seed)
    return [
        Invented(grid, inside_cells(one.mask, grid.shape).to(grid.device), one.origin)
        for one, grid in zip(made, grids([one.picture for one in made]), strict=True)
    ]


_Scaled = tuple[Head, NDArray[np.float64], NDArray[np.float64]]
"""A head with the raw scores of all normal images, joined with the distances and alone."""

_Alone = tuple[Head, list[Tensor], NDArray[np.float64]]
"""A head that has no knee yet, with its maps (1, h, w) of all normal images and their raw scores."""


class _Seen:
    """The views of all images that the head is trained on, and the normal patches' moments by fold."""

    def __init__(
        self,
        memory: Scales,
        normals: Sequence[Grids],
        lessons: Sequence[Lesson],
        invented: Sequence[Invented],
        *,
        weight: float,
        seed: int,
        progress: Progress,
    ) -> None:
        self._memory, self._weight = memory, weight
        self._normals = normals
        self._device = normals[0].device
        self.folds = min(FOLDS, len(lessons), len(normals))
        random = np.random.default_rng(seed)
        self.normal_fold = random.permutation(len(normals)) % self.folds
        self.lesson_fold = random.permutation(len(lessons)) % self.folds
        self._inside = [lesson.inside for lesson in lessons]
        self._worth = float(np.mean([UNDRAWN if inside is None else 1.0 for inside in self._inside]))
        self._lessons = [_look(memory, lesson.grid, ()) for lesson in lessons]
        self._residuals: list[Tensor] = []  # of the normals, in half precision: 300 kB an image of 256 x 256 pixels
        self._distances: list[Tensor] = []
        self._moments: dict[int, _Moments] = {}  # of each fold
        self._bag: list[Tensor] = []
        for index, look in enumerate(each(self._look, range(len(normals)), device=self._device)):
            residuals, distances, some, moments = look
            self._residuals.append(residuals)
            self._distances.append(distances)
            self._bag.append(some)
            fold = int(self.normal_fold[index])
            if fold in self._moments:
                self._moments[fold] += moments
            else:
                self._moments[fold] = moments
            progress((index + 1) / len(normals), "looking at normal images")
        self._made: list[Tensor] = []  # (k, D) each
        for one in each(self._changed, invented, device=self._device):
            self._made.append(one)
            progress(1.0, "looking at synthesised defects")
        self._made_fold = [int(self.normal_fold[one.origin]) for one in invented]
        self.normals_before = [float(raw_scores(distances)[0]) for distances in self._distances]

    def _look(self, index: int) -> tuple[Tensor, Tensor, Tensor, _Moments]:
        """Return a normal image's residuals and distances without its own patches, views to train on, and moments."""
        with torch.inference_mode():
            grid, own = self._normals[index], [(index,)]
            distances, residuals = self._memory.looked_up(grid, without=own)
            seen = views(residuals, grid)[0].flatten(0, 1)
            chosen = _bag(residuals.norm(dim=-1).flatten(), seed=index)
            return residuals.half(), distances, seen[chosen].half(), _Moments(seen, seen[chosen])

    def _changed(self, one: Invented) -> Tensor:
        """Return the views (k, D) of a synthesised defect's patches, as those of an image that was not learnt."""
        with torch.inference_mode():
            seen, _ = _look(self._memory, one.grid, (one.origin,))
            there = _covered(one.inside)
            return seen[0].flatten(0, 1)[there[:: -(-len(there) // PATCHES)]].half()

    def heads(self, left_out: Sequence[int | None], *, seed: int, progress: Progress) -> list[Head]:
        """Train one on all folds but each of those, or on all; centre and spread are still to be found."""
        drafts = [self._directions(without=fold) for fold in left_out]
        *_, (whole, _) = drafts
        networks = network.train(
            network.Space(whole.mean, whole.scale),
            torch.cat(self._bag),
            torch.cat([torch.full((len(one),), fold) for one, fold in zip(self._bag, self.normal_fold, strict=True)]),
            [patches for _, patches in drafts],
            left_out,
            made=self._made,
            made_fold=self._made_fold,
            seed=seed,
            progress=progress,
        )
        return [replace(head, network=net) for (head, _), net in zip(drafts, networks, strict=True)]

    def _directions(self, *, without: int | None) -> tuple[Head, list[Tensor]]:
        """Return a head without network, trained on all folds but one, and the patches (k, D) of each defect's."""
        chosen = [fold for fold in range(self.folds) if fold != without]
        mean, scale, middle, inverse = _space([self._moments[fold] for fold in chosen])
        lessons = [index for index, fold in enumerate(self.lesson_fold) if fold != without]
        views_of = [((self._lessons[index][0][0] - mean) / scale).flatten(0, 1) for index in lessons]
        hot = [self._lessons[index][1][0].flatten() for index in lessons]
        showing = [
            seen[_positives(distance, self._inside[index])]
            for index, seen, distance in zip(lessons, views_of, hot, strict=True)
        ]
        means = torch.stack([patches[:MOST].mean(0) - middle for patches in showing])
        directions = ((1 - OWN) * means.mean(0) + OWN * means) @ inverse
        unit = torch.ones(len(directions) + 1, device=self._device)
        head = Head(mean, scale, directions, torch.zeros_like(unit), unit)
        return head, [patches * scale + mean for patches in showing]

    def scaled(self, heads: Sequence[Head], *, progress: Progress) -> list[_Scaled]:
        """Bring heads to the normal images' scale."""
        sizes = [len(head.centre) for head in heads]

        def along(index: int) -> tuple[Tensor, Tensor]:
            with torch.inference_mode():
                seen = views(self._residuals[index].float(), self._normals[index])[0]
                reached = torch.cat([head.along(seen) for head in heads], dim=-1).permute(2, 0, 1)  # (K, h, w)
                return reached, raw_scores(reached)

        maps, reached = [], []
        for one, scores in each(along, range(len(self._normals)), device=self._device):
            maps.append(torch.split(one, sizes))
            reached.append(scores)
            progress(len(maps) / len(self._normals), "comparing with normal images")
        levels = torch.split(torch.stack(reached), sizes, dim=1)  # of each head: (n, k)
        rows = enumerate(zip(heads, self._owns(len(heads)), strict=True))
        found = [self._own_scale(head, levels[place], [one[place] for one in maps], own) for place, (head, own) in rows]
        knee = self._knee(found)
        return [self._joined(replace(head, knee=knee), deviations, alone) for head, deviations, alone in found]

    def _own_scale(self, head: Head, levels: Tensor, maps: Sequence[Tensor], own: NDArray[np.bool_]) -> _Alone:
        """Scale a head by the normal images it was trained on."""
        mine = torch.from_numpy(own).to(levels.device)
        centre, spread = levels[mine].mean(0), levels[mine].std(0, correction=int(own.sum() > 1)) + 1e-6
        both = [(one - centre[:, None, None]) / spread[:, None, None] for one in maps]  # (k + 1, h, w)
        parts = [torch.stack([one[:-1].amax(0), one[-1]]) for one in both]  # directions and network
        reached = torch.stack([raw_scores(one) for one in parts])  # (n, 2)
        middle, wide = reached[mine].mean(0), reached[mine].std(0, correction=int(own.sum() > 1)) + 1e-6
        index = torch.tensor([0] * (len(centre) - 1) + [1], device=centre.device)
        centre, spread = centre + spread * middle[index], spread * wide[index]
        parts = [(one - middle[:, None, None]) / wide[:, None, None] for one in parts]
        deviations = [together(one[:1], one[1:]) for one in parts]
        alone = np.array([float(raw_scores(one)[0]) for one in deviations])
        before = np.array(self.normals_before)
        taught = len(head.directions) * self._worth
        trust = self._weight * taught / (taught + HALF)
        weight = trust * float(before[own].std()) / (float(alone[own].std()) + 1e-6)
        zero = float(alone[own].mean())
        scaled = replace(head, centre=centre, spread=spread, weight=weight, zero=zero, summed=True)
        return scaled, deviations, alone

    def _knee(self, found: Sequence[_Alone]) -> float:
        """Return how far above its `zero` a typical normal image reaches that a head has not seen.

        A median, because in a cold start there are defects among the images. Ten defects with masks took 34 % off the
        errors of four classes with it, 29 and 19 % with one and two robust deviations more; whole parts held out.
        """
        places = self.normal_fold if len(found) > 1 else np.zeros(len(self._normals), np.int64)
        reached = [found[place][2][index] - found[place][0].zero for index, place in enumerate(places)]
        return float(np.median(reached))

    def _joined(self, head: Head, deviations: Sequence[Tensor], alone: NDArray[np.float64]) -> _Scaled:
        raw = [
            float(raw_scores(fused(distances, head.added(deviation)))[0])
            for distances, deviation in zip(self._distances, deviations, strict=True)
        ]
        return head, np.array(raw), alone

    def _owns(self, heads: int) -> list[NDArray[np.bool_]]:
        """For each head, the normal images it was trained on; the last one has seen all."""
        everything = np.ones(len(self._normals), np.bool_)
        return [self.normal_fold != fold for fold in range(heads - 1)] + [everything]

    def lesson_score(self, index: int, head: Head) -> tuple[float, float]:
        """Return a defect's raw score with a head, and without."""
        seen, distances = self._lessons[index]
        joined = fused(distances, head.added(head.maps(seen)))
        return float(raw_scores(joined)[0]), float(raw_scores(distances)[0])


class _Moments:
    """Sums over the patches of normal images: of all, and of those trained on."""

    def __init__(self, all_of: Tensor, some: Tensor) -> None:
        """Of the views (n, D) of one image's patches, and of those trained on (m, D)."""
        self.counts = np.array([len(all_of), len(some)])
        self.totals = torch.stack([all_of.sum(0, dtype=torch.float64), some.sum(0, dtype=torch.float64)])  # (2, D)
        self.squares = all_of.square().sum(0, dtype=torch.float64)  # (D,)
        self.products = (some.T @ some).double()  # (D, D)

    def __iadd__(self, other: _Moments) -> Self:
        self.counts = self.counts + other.counts
        self.totals = self.totals + other.totals
        self.squares = self.squares + other.squares
        self.products = self.products + other.products
        return self


def _space(moments: Sequence[_Moments]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mean (D,) and standard deviation (D,) of all patches and, of those trained on, in these units, the mean
    (D,) and the ridged inverse (D, D) of the covariance."""
    count, some = np.sum([one.counts for one in moments], axis=0)
    totals = torch.stack([one.totals for one in moments]).sum(0)
    mean, middle = totals[0] / count, totals[1] / some
    variance = torch.stack([one.squares for one in moments]).sum(0) / count - mean.square()
    scale = variance.clamp_min(0).sqrt() + 1e-6
    covariance = torch.stack([one.products for one in moments]).sum(0) / some - torch.outer(middle, middle)
    eye = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    inverse = torch.linalg.inv(covariance / torch.outer(scale, scale) + RIDGE * eye)
    return mean.float(), scale.float(), ((middle - mean) / scale).float(), inverse.float()


def _bag(distances: Tensor, *, seed: int) -> Tensor:
    """Return the places of the patches (n,) that are trained on: the farthest, and any."""
    hardest = distances.topk(min(len(distances), BAG // 2)).indices
    drawn = torch.randperm(len(distances), generator=torch.Generator().manual_seed(seed))[: BAG - BAG // 2]
    return torch.cat([hardest, drawn.to(hardest.device)])


def _look(memory: Scales, grid: Grids, places: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the views (1, h, w, D) and distances (1, h, w) of one grid, its own patches left out."""
    distances, residuals = memory.looked_up(grid, without=[places])
    return views(residuals, grid), distances


def _positives(distances: Tensor, inside: Tensor | None) -> Tensor:
    """Return the indices of the patches (h * w) that show the defect, the farthest first."""
    if inside is None:
        return distances.topk(max(1, int(POSITIVE * len(distances)))).indices
    there = _covered(inside)
    return there[distances[there].topk(min(len(there), PATCHES)).indices]


def _covered(inside: Tensor) -> Tensor:
    """Return the indices of the cells that are half inside, or those of which most is where none is."""
    shares = inside.flatten()
    return (shares >= min(0.5, 0.5 * float(shares.max()))).nonzero()[:, 0]


def inside_cells(mask: NDArray[np.bool_], shape: tuple[int, int]) -> Tensor:
    """Return the share (h, w) of each cell of a grid that is inside a mask of any resolution."""
    return functional.interpolate(torch.from_numpy(mask.astype(np.float32))[None, None], size=shape, mode="area")[0, 0]


def _part(progress: Progress, start: float, stop: float) -> Progress:
    return lambda fraction, stage: progress(start + (stop - start) * fraction, stage)
