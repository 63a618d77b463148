"""Measure what a few confirmed defects are worth: bank, head and what would be deployed, over shots and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from anomaly_workers import detectors, evaluate
from anomaly_workers.detectors.deviation import Head, fused, views
from anomaly_workers.detectors.patchwise import PatchwiseDetector, detections
from anomaly_workers.detectors.scales import Grids
from anomaly_workers.errors import ConfigError
from anomaly_workers.evaluate import ClassFolder, EvalOptions, Figures
from anomaly_workers.refine import gate
from anomaly_workers.refine.study import WEIGHT, Lesson, Study, inside_cells, invent, study
from anomaly_workers.types import JSON, Detection, Picture

KINDS = ("bank", "head", "fused")

COLUMNS = tuple(column for column in evaluate.COLUMNS if column not in ("fit_s", "images_per_s"))


@dataclass(frozen=True, slots=True)
class ShotOptions:
    """What to draw.

    Attributes:
        shots: numbers of confirmed defects.
        seeds: draws for each number.
        masks: use the ground truth of the shots, or their verdicts alone.
        unseen: a defect type, the name of a folder in pool/, that is never among the shots and alone, with the normal
            images, in test/: the hard setting of DRA (arXiv 2203.14506, section 4.1); "" for none.
        weight: how much the head counts beside the bank, ANOMALY_HEAD_WEIGHT.
    """

    shots: tuple[int, ...] = (0, 1, 5, 10)
    seeds: int = 5
    masks: bool = True
    unseen: str = ""
    weight: float = WEIGHT


@dataclass(frozen=True, slots=True, eq=False)
class _Looked:
    """A test image as every head sees it; features in half precision to keep a class in memory."""

    grid: Grids = field(repr=False)
    residuals: Tensor = field(repr=False)
    distances: Tensor = field(repr=False)


def evaluate_shots(
    folders: Sequence[Path], options: EvalOptions, drawn: ShotOptions, *, console: Console | None = None
) -> JSON:
    """Fit on train/good, draw shots from pool/, train, pass the gate, score test/; print a table, return all figures.

    Returns:
        `{class: {"shots": {"10": {"fused": {figure: {"mean": …, "std": …}, …}, "bank": …, "head": …}, …}}, …}`. The
        figures are those of `eval`; "fused" is what would be deployed, the bank where the gate keeps the head back.

    Raises:
        ConfigError: a folder is not in MVTec layout or has too few defects in pool/, or the method learns no defects.
    """
    console = console or Console(quiet=True)
    classes = [evaluate.read_class(folder) for folder in evaluate.class_folders(folders)]
    _check(classes, drawn)
    if drawn.unseen:
        classes = [_only(one, drawn.unseen) for one in classes]
    figures: JSON = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        total = len(classes) * len(drawn.shots) * drawn.seeds
        bar = bars.add_task("draws", total=total)
        for one in classes:
            bars.update(bar, description=one.name)
            figures[one.name] = {"shots": _class(one, options, drawn, bars, bar)}
    figures["mean"] = {"shots": {str(count): _over_classes(figures, str(count)) for count in drawn.shots}}
    console.print(_table(figures))
    return figures


def _class(one: ClassFolder, options: EvalOptions, drawn: ShotOptions, bars: Progress, bar: Any) -> JSON:
    detector = cast("PatchwiseDetector", detectors.create(evaluate.detector_options(options)))
    if not detector.learns_defects:
        raise ConfigError(f"{options.detector} learns no defects. Use --detector patchcore-padim or patchcore.")
    pictures = [picture for batch in evaluate.decoded(one.train, detector.side) for picture in batch]
    grids = detector.grids(pictures)
    kept = detector.fit_grids(grids, pictures, [True] * len(pictures))
    normals, invented = [grids[i] for i in kept], invent(detector.grids, [pictures[i] for i in kept])
    test = [picture for batch in evaluate.decoded(one.test, detector.side) for picture in batch]
    looked = [_look(detector, grid) for grid in detector.grids(test)]
    bank = evaluate.measured(one, _detections(detector, test, looked, None))
    found: JSON = {}
    for count in drawn.shots:
        rows: dict[str, list[Figures]] = {kind: [] for kind in KINDS}
        promoted = 0
        for seed in range(drawn.seeds):
            files = _draw(one, count, seed, drawn.unseen)
            row = dict.fromkeys(KINDS, bank)
            if files:
                lessons = _lessons(detector, one, files, drawn.masks)
                taught = study(detector.memory, normals, lessons, invented=invented, weight=drawn.weight, seed=seed)
                joined = detector.joined(taught.head, taught.normals.tolist())
                alone = detector.joined(taught.head, taught.normals_alone.tolist())
                row["head"] = evaluate.measured(one, _detections(alone, test, looked, taught.head, alone=True))
                if gate.decide(trials(detector, joined, taught), seed=seed).promote:
                    promoted += 1
                    row["fused"] = evaluate.measured(one, _detections(joined, test, looked, taught.head))
            for kind in KINDS:
                rows[kind].append(row[kind])
            bars.advance(bar)
        found[str(count)] = {kind: _spread(rows[kind]) for kind in KINDS} | {"promoted": promoted / drawn.seeds}
    return found


def _only(one: ClassFolder, kind: str) -> ClassFolder:
    """Return a class whose test/ has the normal images and one type of defect."""
    kept = [place for place, path in enumerate(one.test) if not one.labels[place] or path.parent.name == kind]
    return replace(
        one,
        test=tuple(one.test[place] for place in kept),
        labels=tuple(one.labels[place] for place in kept),
        masks=tuple(one.masks[place] for place in kept),
    )


def _draw(one: ClassFolder, count: int, seed: int, unseen: str) -> list[Path]:
    """Return `count` files of pool/; a larger number holds the smaller ones of the same seed."""
    pool = [path for path in one.pool if path.parent.name != unseen]
    order = np.random.default_rng(seed).permutation(len(pool))
    return [pool[index] for index in order[:count]]


def _lessons(detector: PatchwiseDetector, one: ClassFolder, files: Sequence[Path], masks: bool) -> list[Lesson]:
    pictures = [picture for batch in evaluate.decoded(files, detector.side) for picture in batch]
    lessons = []
    for path, picture, grid in zip(files, pictures, detector.grids(pictures), strict=True):
        mask = evaluate.mask_file(path.parents[2], path) if masks else None
        inside = None
        if mask is not None:
            whole = evaluate.read_mask(mask, picture.pixels.shape[:2])
            inside = inside_cells(whole, grid.shape).to(grid.device)
        lessons.append(Lesson(grid, inside if inside is None or bool(inside.any()) else None))
    return lessons


def trials(detector: PatchwiseDetector, joined: PatchwiseDetector, taught: Study) -> list[gate.Trial]:
    """Return the gate's trials on what a head was trained on, each image by folds that did not see it."""
    pairs = [(False, taught.normals_before, taught.normals), (True, taught.lessons_before, taught.lessons)]
    return [
        gate.Trial(index, anomaly, detector.calibrated(float(before)), joined.calibrated(float(after)))
        for anomaly, old, new in pairs
        for index, (before, after) in enumerate(zip(old, new, strict=True))
    ]


def _look(detector: PatchwiseDetector, grid: Grids) -> _Looked:
    with torch.inference_mode():
        distances, residuals = detector.memory.looked_up(grid)
        return _Looked(grid.half(), residuals.half(), distances)


def _detections(
    detector: PatchwiseDetector,
    pictures: Sequence[Picture],
    looked: Sequence[_Looked],
    head: Head | None,
    *,
    alone: bool = False,
) -> list[Detection]:
    found = []
    with torch.inference_mode():
        for picture, one in zip(pictures, looked, strict=True):
            values = one.distances
            if head is not None:
                deviation = head.maps(views(one.residuals.float(), one.grid.float()))
                values = deviation if alone else fused(values, head.added(deviation))
            found += detections(detector, [picture], values)
    return found


def _spread(rows: Sequence[Figures]) -> JSON:
    """Return mean and standard deviation of each figure over the draws."""
    spread: JSON = {}
    for column in COLUMNS:
        values = [value for row in rows if (value := row[column]) is not None]
        spread[column] = {"mean": float(np.mean(values)), "std": float(np.std(values))} if values else None
    return spread


def _over_classes(figures: Mapping[str, Any], count: str) -> JSON:
    classes = [row["shots"][count] for name, row in figures.items() if name != "mean"]
    means: JSON = {}
    for kind in KINDS:
        means[kind] = {}
        for column in COLUMNS:
            values = [row[kind][column]["mean"] for row in classes if row[kind][column] is not None]
            means[kind][column] = {"mean": float(np.mean(values))} if values else None
    return means


def _check(classes: Sequence[ClassFolder], drawn: ShotOptions) -> None:
    for one in classes:
        pool = [path for path in one.pool if path.parent.name != drawn.unseen]
        if len(pool) < max(drawn.shots, default=0):
            raise ConfigError(
                f"{one.name} has {len(pool)} defects in pool/ to draw from, {max(drawn.shots)} are asked for. "
                "Add some, or ask for fewer --shots."
            )
        if drawn.unseen and len(pool) == len(one.pool):
            kinds = ", ".join(sorted({path.parent.name for path in one.pool}))
            raise ConfigError(f"{one.name} has no defect type {drawn.unseen!r} in pool/. There are: {kinds}.")
        if drawn.unseen and all(path.parent.name != drawn.unseen for path in one.test):
            raise ConfigError(f"{one.name} has no defect type {drawn.unseen!r} in test/ to measure on. Add some.")


def _table(figures: Mapping[str, Any]) -> Table:
    table = Table("class", "shots", "bank", "head", "fused", "AUPRO bank", "fused", "promoted", padding=(0, 0))
    for name, row in figures.items():
        for count, kinds in row["shots"].items():
            cells = [_cell(kinds[kind]["image_auroc"]) for kind in KINDS]
            cells += [_cell(kinds[kind]["aupro"]) for kind in ("bank", "fused")]
            promoted = f"{kinds['promoted']:.0%}" if "promoted" in kinds else ""
            table.add_row(name, count, *cells, promoted, style="bold" if name == "mean" else "")
    return table


def _cell(value: Mapping[str, float] | None) -> str:
    if value is None:
        return "-"
    return f"{value['mean']:.3f}" + (f" ±{value['std']:.3f}" if "std" in value else "")
