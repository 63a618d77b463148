"""What all detectors share that compare an image's patches with remembered normal ones."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from anomaly_workers import backbones
from anomaly_workers.backbones import Backbone
from anomaly_workers.calibration import THRESHOLD, Calibration, calibrate
from anomaly_workers.detectors.base import Detector, Options
from anomaly_workers.detectors.coldstart import trusted
from anomaly_workers.detectors.crossfit import held_out_scores
from anomaly_workers.detectors.deviation import Head, fused, views
from anomaly_workers.detectors.maps import raw_maps, raw_scores, smoothed
from anomaly_workers.detectors.memory import Memory
from anomaly_workers.detectors.parallel import each
from anomaly_workers.detectors.patches import grid_batch, patch_grids, same_shapes
from anomaly_workers.detectors.scales import Grids, Scales
from anomaly_workers.errors import ConfigError, NotFitted, StoreError
from anomaly_workers.types import JSON, Detection, Picture, Progress, no_progress

TENSORS = "detector.safetensors"
CARD = "detector.json"

HOTTEST = 16
"""Patches of each image by which look-alikes are found."""


class PatchwiseDetector(Detector):
    """A detector that is a frozen backbone, a memory of normal patches and a calibration.

    Subclasses name their kind of memory.

    Attributes:
        memory_type: of the patches.
        context_type: of the wide surroundings that the network's deepest layer sees; None leaves them out.
        learns_defects: whether `memory.looked_up` works, which a head needs.
        held_out: after a fit, the score of each remembered picture by what was learnt from the others; not saved.
        left_out: after a fit, how many pictures were too odd to be remembered; not saved.
    """

    memory_type: type[Memory]
    context_type: type[Memory] | None = None
    learns_defects = True
    held_out: tuple[float, ...] = ()
    left_out: int = 0

    def __init__(self, options: Options) -> None:
        self.options = options
        self.side = options.image_size
        self.threshold = THRESHOLD
        self.backbone = _backbone(options, context=self.context_type is not None)
        self._fitted: Scales | None = None
        self._memory: Scales | None = None  # the fitted one, and what was taken as normal since
        self._head: Head | None = None
        self._unconfirmed: dict[str, tuple[int, ...]] = {}  # fingerprint -> places among the learnt grids
        self._calibration: Calibration | None = None

    def fit(
        self, pictures: Sequence[Picture], *, confirmed: Sequence[bool] = (), progress: Progress = no_progress
    ) -> None:
        """See `Detector.fit`.

        Suspicious unconfirmed pictures are left out as `coldstart.trusted` says. The others are remembered by a
        fingerprint: when such a picture is scored later, its own patches do not speak for it.
        """
        flags = _flags(pictures, confirmed)
        self.fit_grids(
            self.grids(pictures, progress=_part(progress, 0.0, 0.5)), pictures, flags, _part(progress, 0.5, 1)
        )

    def grids(self, pictures: Sequence[Picture], *, progress: Progress = no_progress) -> list[Grids]:
        """Return each picture's features, n = 1."""
        return patch_grids(self.backbone, pictures, progress=progress)

    def fit_grids(
        self,
        grids: Sequence[Grids],
        pictures: Sequence[Picture],
        confirmed: Sequence[bool],
        progress: Progress = no_progress,
        *,
        defects: Sequence[Grids] = (),
    ) -> list[int]:
        """Do what `fit` does with grids that were computed before; return the places of those it remembers.

        A picture that was uploaded twice is remembered once: its twin would make it look too normal when held out.
        `defects`, pictures that somebody called anomalous, help to find what is suspicious among the unconfirmed ones.
        """
        seed = self.options.seed
        patches, known = [one.patches[0] for one in grids], [one.patches[0] for one in defects]
        kept = trusted(patches, confirmed, defects=known, seed=seed, progress=_part(progress, 0.0, 0.2))
        self.left_out = len(grids) - len(kept)
        kept = _once(kept, pictures, confirmed)
        normal = [grids[i] for i in kept]
        self._fitted = self._memory = Scales.learn(
            self.memory_type, self.context_type, normal, seed=seed, progress=_part(progress, 0.2, 0.8)
        )
        self._head = None
        self._calibrate(held_out_scores(self._memory, normal, progress=_part(progress, 0.8, 1.0)))
        unconfirmed = [(place, pictures[i]) for place, i in enumerate(kept) if not confirmed[i]]
        self._unconfirmed = _places(unconfirmed)
        progress(1.0, "fitted")
        return kept

    @property
    def memory(self) -> Scales:
        """What was fitted.

        Raises:
            NotFitted: before `fit` or `load`.
        """
        if self._fitted is None:
            raise NotFitted("This detector has not been fitted. Call fit or load first.")
        return self._fitted

    def joined(self, head: Head, held_out: Sequence[float]) -> Self:
        """Return a detector of the same memory that adds a head's map to the distances.

        Args:
            head: what was learnt from confirmed defects.
            held_out: raw scores of normal images with the head, by a model that did not see them.
        """
        other = copy.copy(self)
        other._head = head
        other._calibrate(held_out)
        return other

    def calibrated(self, raw: float) -> float:
        """Return the score in [0, 1] of a raw one.

        Raises:
            NotFitted: before `fit` or `load`.
        """
        return self.calibration.score(raw)

    @property
    def calibration(self) -> Calibration:
        """From raw scores to calibrated ones.

        Raises:
            NotFitted: before `fit` or `load`.
        """
        if self._calibration is None:
            raise NotFitted("This detector has not been fitted. Call fit or load first.")
        return self._calibration

    def _calibrate(self, held_out: Sequence[float]) -> None:
        self._calibration = calibrate(held_out, target_fpr=self.options.target_fpr, left_out=self.left_out)
        self.held_out = tuple(self._calibration.score(raw) for raw in held_out)

    def predict(self, pictures: Sequence[Picture]) -> list[Detection]:
        """See `Detector.predict`; pictures of one shape share a pass."""
        _ = self.calibration  # raises before the backbone works in vain

        def batch(indices: list[int]) -> list[Detection]:
            with torch.inference_mode():
                grids = grid_batch(self.backbone, pictures, indices)
                return self.predict_grids([pictures[index] for index in indices], grids)

        batches = same_shapes(pictures)
        found: dict[int, Detection] = {}
        for indices, detections in zip(batches, each(batch, batches, device=self.backbone.device), strict=True):
            found |= dict(zip(indices, detections, strict=True))
        return [found[index] for index in range(len(pictures))]

    def predict_grids(self, pictures: Sequence[Picture], grids: Grids) -> list[Detection]:
        """Do what `predict` does with the grids of n equally shaped pictures, computed before."""
        with torch.inference_mode():
            own = [self._unconfirmed.get(fingerprint(picture), ()) for picture in pictures]
            distances, fitted, parts = self._seen(grids, own)  # (n, h, w) twice, (n, 2)
            rows = _hottest(grids.patches, distances)
            if fitted is not distances:  # what is calm now is hot again when its rejection is taken back
                rows = [np.concatenate(pair) for pair in zip(rows, _hottest(grids.patches, fitted), strict=True)]
            found = _detections(pictures, rows, distances, self.calibration, threshold=self.threshold)
        return [replace(one, parts=tuple(row)) for one, row in zip(found, parts, strict=True)]

    def _distances(self, grids: Grids) -> Tensor:
        """Return how abnormal each patch is, (n, h, w), in distances; a head may make it negative."""
        return self._seen(grids)[0]

    def _seen(self, grids: Grids, without: Sequence[tuple[int, ...]] = ()) -> tuple[Tensor, Tensor, list[list[float]]]:
        """Return how abnormal each patch is (n, h, w), the same as fitted, and the parts of the n raw scores.

        The first two are one where nothing was taken as normal since the fit.
        """
        fitted, memory, head = self.memory, self._memory or self.memory, self._head
        if head is None:
            plain = fitted.distances(grids, without=without)
            calm = plain if memory is fitted else memory.distances(grids, without=without)
            return calm, plain, [[] for _ in range(len(grids))]
        distances, residuals = fitted.looked_up(grids, without=without)
        deviations = head.maps(views(residuals, grids))  # (n, h, w)
        parts = torch.stack([raw_scores(distances), raw_scores(deviations - head.zero)], dim=1).tolist()  # (n, 2)
        more = head.added(deviations)
        plain = fused(distances, more)
        if memory is fitted:
            return plain, plain, parts
        calm = memory.distances(grids, without=without)  # what was taken as normal is no defect to the head either
        shrunk = more * (calm / distances.clamp_min(1e-6)).clamp_max(1)
        return fused(calm, torch.where(more > 0, shrunk, more)), plain, parts

    def quietening(self, picture: Picture, where: NDArray[np.bool_] | None = None) -> NDArray[np.float16]:
        """See `Detector.quietening`: the patches farther away than a typical normal image's score, or the threshold."""
        typical = self.calibration.limit - self.calibration.unit
        level = min(typical, self.calibration.raw(self.threshold))
        if not self.learns_defects:
            return np.zeros((0, 0), np.float16)
        with torch.inference_mode():
            grids = grid_batch(self.backbone, [picture], [0])  # n = 1
            distances = self._distances(grids)
            hot = torch.maximum(distances, smoothed(distances))[0] > level
            if where is not None:
                hot &= _on_grid(where, (hot.shape[0], hot.shape[1])).to(hot.device)
            return np.asarray(grids.patches[0][hot].half().cpu().numpy())

    def take_as_normal(self, patches: NDArray[np.float16]) -> None:
        """See `Detector.take_as_normal`."""
        if self._fitted is None:
            raise NotFitted("This detector has not been fitted. Call fit or load first.")
        rows = torch.from_numpy(patches).float().to(self.backbone.device)
        self._memory = self._fitted.plus(rows) if len(rows) else self._fitted

    def is_quietened(self, hottest: NDArray[np.float16], patches: NDArray[np.float16]) -> bool:
        """See `Detector.is_quietened`."""
        if not len(patches) or not len(hottest):
            return False
        hot, normal = (torch.from_numpy(rows).float().to(self.backbone.device) for rows in (hottest, patches))
        return self.memory.is_nearer(hot, normal)

    def save(self, folder: Path) -> None:
        """See `Detector.save`."""
        if self._fitted is None or self._calibration is None:
            raise NotFitted("There is nothing to save yet. Call fit first.")
        whole = self._fitted.state() | (self._head.state() if self._head else {})
        state = {name: tensor.cpu().contiguous() for name, tensor in whole.items()}
        safetensors.torch.save_file(state, folder / TENSORS)
        options = {**asdict(self.options), "device": "cpu"}
        card: JSON = {"options": options, "calibration": asdict(self._calibration), "threshold": self.threshold}
        card["unconfirmed"] = self._unconfirmed
        (folder / CARD).write_text(json.dumps(card, indent=1))

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu") -> Self:
        """See `Detector.load`."""
        try:
            card: dict[str, Any] = json.loads((folder / CARD).read_text())
            options = replace(Options(**card["options"]), device=device)
            calibration, threshold = Calibration(**card["calibration"]), float(card["threshold"])
            state = safetensors.torch.load_file(folder / TENSORS, device=device)
            memory, head = Scales.restore(cls.memory_type, cls.context_type, state), Head.restore(state)
            unconfirmed = {str(key): tuple(places) for key, places in card["unconfirmed"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
            raise StoreError(f"The model in {folder} is missing or damaged ({error}). Fit it again.") from error
        detector = cls(options)
        detector._fitted, detector._memory, detector._head = memory, memory, head
        detector._calibration, detector.threshold = calibration, threshold
        detector._unconfirmed = unconfirmed
        return detector


def detections(detector: PatchwiseDetector, pictures: Sequence[Picture], distances: Tensor) -> list[Detection]:
    """Turn the patch distances (n, h, w) of equally shaped pictures into what a fitted detector says of them."""
    calibration = detector.calibration
    none = np.zeros((0, 0), np.float16)
    return _detections(pictures, [none] * len(pictures), distances, calibration, threshold=detector.threshold)


def _detections(
    pictures: Sequence[Picture],
    rows: Sequence[NDArray[np.float16]],
    distances: Tensor,
    calibration: Calibration,
    *,
    threshold: float,
) -> list[Detection]:
    """Turn the patch distances (n, h, w) of equally shaped pictures into calibrated scores and maps."""
    height, width = pictures[0].pixels.shape[:2]
    maps = calibration(raw_maps(distances, (height, width)).cpu().numpy())  # (n, height, width)
    scores = [calibration.score(raw) for raw in raw_scores(distances).tolist()]
    return [
        Detection(score=score, threshold=threshold, anomaly_map=anomaly_map, size=picture.size, hottest=row)
        for picture, score, anomaly_map, row in zip(pictures, scores, maps, rows, strict=True)
    ]


def _hottest(grids: Tensor, distances: Tensor) -> list[NDArray[np.float16]]:
    """Return the features (k, d) of the patches of each grid of (n, h, w, d) with the highest distances (n, h, w)."""
    places = distances.flatten(1).topk(min(HOTTEST, distances[0].numel()), dim=1).indices  # (n, k)
    return [grid.flatten(0, 1)[at].half().cpu().numpy() for grid, at in zip(grids, places, strict=True)]


def _on_grid(where: NDArray[np.bool_], shape: tuple[int, int]) -> Tensor:
    """Return the cells (h, w) that a mask touches, or whose neighbour it does."""
    mask = torch.from_numpy(where.astype(np.float32))[None, None]
    cells = functional.adaptive_max_pool2d(mask, shape)
    return functional.max_pool2d(cells, 3, 1, 1)[0, 0] > 0


def fingerprint(picture: Picture) -> str:
    """Return a digest of a picture's pixels."""
    return hashlib.blake2b(picture.pixels.tobytes(), digest_size=10).hexdigest()


def _once(places: Sequence[int], pictures: Sequence[Picture], confirmed: Sequence[bool]) -> list[int]:
    """Return one place of each picture, a confirmed one if there is; all places where all pictures are the same."""
    first: dict[str, int] = {}
    for place in sorted(places, key=lambda place: not confirmed[place]):
        first.setdefault(fingerprint(pictures[place]), place)
    return sorted(first.values()) if len(first) > 1 else list(places)


def _places(pictures: Sequence[tuple[int, Picture]]) -> dict[str, tuple[int, ...]]:
    """Return the places of each fingerprint among the learnt grids."""
    places: dict[str, tuple[int, ...]] = {}
    for place, picture in pictures:
        key = fingerprint(picture)
        places[key] = (*places.get(key, ()), place)
    return places


def saved_name(folder: Path) -> str:
    """Return the name of the method that saved a folder.

    Raises:
        StoreError: its card is missing or damaged.
    """
    try:
        return str(json.loads((folder / CARD).read_text())["options"]["detector"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder} holds no model ({error}). Name a version's folder.") from error


def _backbone(options: Options, *, context: bool) -> Backbone:
    weights, sha256 = Path(options.weights) if options.weights else None, options.weights_sha256
    return backbones.create(options.backbone, weights=weights, sha256=sha256, device=options.device, context=context)


def _flags(pictures: Sequence[Picture], confirmed: Sequence[bool]) -> list[bool]:
    if len(pictures) < 2:
        raise ConfigError(f"A detector needs at least two pictures, not {len(pictures)}. Add some that look normal.")
    if confirmed and len(confirmed) != len(pictures):
        raise ConfigError(
            f"There are {len(confirmed)} confirmed flags for {len(pictures)} pictures. Give one for each."
        )
    return list(confirmed) or [False] * len(pictures)


def _part(progress: Progress, start: float, stop: float) -> Progress:
    """Return a progress callback for a stage that is the share from `start` to `stop` of the whole."""
    return lambda fraction, stage: progress(start + (stop - start) * fraction, stage)
