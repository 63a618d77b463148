"""Fit and measure a detector on image folders in MVTec layout."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from anomaly_workers import detectors, images, metrics
from anomaly_workers.errors import ConfigError
from anomaly_workers.runtime import choose_device
from anomaly_workers.types import Detection, Picture

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"})
"""Files taken for images."""

BATCH = 32
"""Images decoded while the network works on as many others."""

Figures = dict[str, float | None]

COLUMNS = (
    "image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "aupro",
    "fit_s", "images_per_s", "threshold", "fpr_at_threshold", "recall_at_threshold",
)  # fmt: skip
"""What is measured of a class."""


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What to evaluate.

    Attributes:
        detector, backbone, weights, weights_sha256, image_size, seed: as in `detectors.Options`.
        device: "auto", "cpu", "cuda" or "cuda:N".
        contamination: share of the training images replaced by defects from pool/; above 0 nothing counts as confirmed,
            as in a project that nobody labelled.
        target_fpr: false-positive rate the threshold aims at.
    """

    detector: str = "patchcore-padim"
    backbone: str = "efficientnet_lite0"
    image_size: int = 256
    device: str = "auto"
    seed: int = 0
    contamination: float = 0.0
    weights: str = ""
    weights_sha256: str = ""
    target_fpr: float = 0.01


@dataclass(frozen=True, slots=True)
class ClassFolder:
    """One class in MVTec layout: paths only.

    Attributes:
        name: the folder's name.
        train: normal images to learn from.
        test: images to score.
        labels: for each of `test`, True where it is a defect.
        masks: for each of `test`, the file with its mask, None where there is none.
        pool: further defects.
    """

    name: str
    train: tuple[Path, ...]
    test: tuple[Path, ...]
    labels: tuple[bool, ...]
    masks: tuple[Path | None, ...]
    pool: tuple[Path, ...]


def evaluate(folders: Sequence[Path], options: EvalOptions, *, console: Console | None = None) -> dict[str, Figures]:
    """Fit on each class's train/good, score its test/, print a table, and return the figures by class and their mean.

    Args:
        folders: classes in MVTec layout, or folders that hold such classes.
        options: what to evaluate.
        console: where the bars and the table go; nowhere by default.

    Raises:
        ConfigError: a folder is not in that layout, or an option does not fit.
        ImageError: an image cannot be read.
    """
    console = console or Console(quiet=True)
    classes = [read_class(folder) for folder in class_folders(folders)]
    _check(options, classes)
    figures: dict[str, Figures] = {}
    with _bars(console) as bars:
        whole = bars.add_task("classes", total=len(classes))
        for one in classes:
            figures[one.name] = evaluate_class(one, options, bars=bars)
            bars.advance(whole)
    figures["mean"] = _mean(list(figures.values()))
    console.print(_table(figures))
    return figures


def evaluate_class(one: ClassFolder, options: EvalOptions, *, bars: Progress | None = None) -> Figures:
    """Return one class's figures."""
    bars = bars or Progress(disable=True)
    detector = detectors.create(detector_options(options))
    task = bars.add_task(f"{one.name}: fit", total=1.0)
    start = time.perf_counter()
    train = _training_files(one, options)
    confirmed = [True] * len(train) if options.contamination == 0 else []
    pictures = [picture for batch in decoded(train, detector.side) for picture in batch]
    detector.fit(pictures, confirmed=confirmed, progress=lambda done, _stage: bars.update(task, completed=done))
    fit_s = time.perf_counter() - start
    bars.update(task, description=f"{one.name}: score", total=len(one.test), completed=0)
    start = time.perf_counter()
    detections: list[Detection] = []
    for batch in decoded(one.test, detector.side):
        detections += detector.predict(batch)
        bars.update(task, completed=len(detections))
    seconds = time.perf_counter() - start
    bars.remove_task(task)
    return {**measured(one, detections), "fit_s": round(fit_s, 3), "images_per_s": round(len(one.test) / seconds, 2)}


def measured(one: ClassFolder, detections: Sequence[Detection]) -> Figures:
    """Return the figures of accuracy; those of pixels are None where the class has no masks."""
    labels = np.array(one.labels, np.bool_)
    scores = np.array([detection.score for detection in detections], np.float64)
    fpr, recall = metrics.rates(labels, np.array([detection.is_anomaly for detection in detections], np.bool_))
    figures: Figures = dict.fromkeys(COLUMNS)
    figures |= {
        "image_auroc": metrics.auroc(labels, scores),
        "image_ap": metrics.average_precision(labels, scores),
        "image_f1_max": metrics.f1_max(labels, scores),
        "threshold": detections[0].threshold,
        "fpr_at_threshold": fpr,
        "recall_at_threshold": recall,
    }
    if any(one.masks):
        masks, maps = _masked(one, detections)
        figures |= {"pixel_auroc": metrics.pixel_auroc(masks, maps), "aupro": metrics.aupro(masks, maps)}
    return figures


def class_folders(folders: Sequence[Path]) -> list[Path]:
    """Return the class folders among and directly inside `folders`.

    Raises:
        ConfigError: none there, or two of one name.
    """
    found: list[Path] = []
    for folder in folders:
        inside = [folder] if _is_class(folder) else sorted(child for child in _children(folder) if _is_class(child))
        if not inside:
            raise ConfigError(
                f"{folder} is no class in MVTec layout and holds none. A class has images in train/good and test/."
            )
        found += inside
    names = [folder.resolve().name for folder in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice or "mean" in names:
        raise ConfigError(f"Class names must differ and not be 'mean': {', '.join(sorted(twice) or ['mean'])}. Rename.")
    return found


def read_class(folder: Path) -> ClassFolder:
    """List one class's files.

    Raises:
        ConfigError: fewer than two training images, or nothing to test.
    """
    train = image_files(folder / "train" / "good")
    test = [path for kind in sorted(_children(folder / "test")) for path in image_files(kind)]
    if len(train) < 2:
        raise ConfigError(f"{folder / 'train' / 'good'} holds {len(train)} images. Put at least two there.")
    if not test:
        raise ConfigError(f"{folder / 'test'} holds no images. Put good ones in test/good, defects in test/NAME.")
    return ClassFolder(
        name=folder.resolve().name,
        train=tuple(train),
        test=tuple(test),
        labels=tuple(path.parent.name != "good" for path in test),
        masks=tuple(mask_file(folder, path) for path in test),
        pool=tuple(path for kind in sorted(_children(folder / "pool")) for path in image_files(kind)),
    )


def image_files(folder: Path) -> list[Path]:
    """Return a folder's image files by name; none where it does not exist."""
    return sorted(path for path in _children(folder) if path.suffix.lower() in SUFFIXES)


def decoded(files: Sequence[Path], side: int) -> Iterator[list[Picture]]:
    """Yield pictures in batches; threads read the next batch while the caller works on one."""
    parts = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
    with ThreadPoolExecutor(max_workers=2, thread_name_prefix="decode") as threads:
        coming = [threads.submit(images.load, path, side=side) for path in parts[0]] if parts else []
        for following in [*parts[1:], []]:
            now, coming = coming, [threads.submit(images.load, path, side=side) for path in following]
            yield [future.result() for future in now]


def _check(options: EvalOptions, classes: Sequence[ClassFolder]) -> None:
    if not 0 <= options.contamination < 1:
        raise ConfigError(f"Contamination is a share from 0 to below 1, not {options.contamination}.")
    without = [one.name for one in classes if not one.pool]
    if options.contamination and without:
        raise ConfigError(f"Contamination needs defects in pool/, which {', '.join(without)} lacks. Leave it out.")


def detector_options(options: EvalOptions) -> detectors.Options:
    """Return what the options say about the detector."""
    return detectors.Options(
        detector=options.detector,
        backbone=options.backbone,
        weights=options.weights,
        weights_sha256=options.weights_sha256,
        image_size=options.image_size,
        device=choose_device(options.device),
        target_fpr=options.target_fpr,
        seed=options.seed,
    )


def _training_files(one: ClassFolder, options: EvalOptions) -> list[Path]:
    """Return the training files, a share of them replaced by pool defects as far as there are any."""
    random = np.random.default_rng(options.seed)
    count = min(round(options.contamination * len(one.train)), len(one.pool))
    places = random.permutation(len(one.train))[:count]
    defects = random.permutation(len(one.pool))[:count]
    files = list(one.train)
    for place, defect in zip(places, defects, strict=True):
        files[place] = one.pool[defect]
    return files


def _masked(
    one: ClassFolder, detections: Sequence[Detection]
) -> tuple[list[NDArray[np.bool_]], list[NDArray[np.float32]]]:
    """Return masks at the maps' resolution with their maps; defects without a mask are left out."""
    masks, maps = [], []
    for label, file, detection in zip(one.labels, one.masks, detections, strict=True):
        values = detection.anomaly_map
        if file is None and label:
            continue
        masks.append(np.zeros(values.shape, np.bool_) if file is None else read_mask(file, values.shape))
        maps.append(values)
    return masks, maps


def read_mask(file: Path, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return a ground-truth mask at a shape (height, width)."""
    with Image.open(file) as image:
        small = image.convert("L").resize((shape[1], shape[0]), Image.Resampling.NEAREST)
    return np.asarray(small) > 127


def mask_file(folder: Path, image: Path) -> Path | None:
    """Return the ground truth of an image of the class in `folder`, None where there is none."""
    kind = folder / "ground_truth" / image.parent.name
    names = (f"{image.stem}_mask.png", f"{image.stem}.png")
    return next((kind / name for name in names if (kind / name).is_file()), None)


def _is_class(folder: Path) -> bool:
    return (folder / "train" / "good").is_dir() and (folder / "test").is_dir()


def _children(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _mean(figures: Sequence[Figures]) -> Figures:
    means: Figures = {}
    for column in COLUMNS:
        values = [value for one in figures if (value := one[column]) is not None]
        means[column] = float(np.mean(values)) if values else None
    return means


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


_SHOWN = {
    "image_auroc": "AUROC",
    "image_ap": "AP",
    "image_f1_max": "F1",
    "pixel_auroc": "pixel",
    "aupro": "AUPRO",
    "fpr_at_threshold": "FPR",
    "recall_at_threshold": "recall",
    "fit_s": "fit s",
    "images_per_s": "img/s",
}
"""What the table shows, under names short enough for a terminal of 80 columns."""


def _table(figures: dict[str, Figures]) -> Table:
    table = Table("class", *_SHOWN.values(), padding=(0, 0))
    for name, row in figures.items():
        cells = ["-" if (value := row[column]) is None else _shown(column, value) for column in _SHOWN]
        table.add_row(name, *cells, style="bold" if name == "mean" else "")
    return table


def _shown(column: str, value: float) -> str:
    return f"{value:.1f}" if column in {"fit_s", "images_per_s"} else f"{value:.3f}"
