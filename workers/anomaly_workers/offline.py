"""Score image files without Label Studio."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from anomaly_workers import detectors, images
from anomaly_workers.detectors.base import Detector
from anomaly_workers.detectors.regions import regions
from anomaly_workers.errors import ConfigError, ImageError
from anomaly_workers.evaluate import image_files
from anomaly_workers.runtime import choose_device
from anomaly_workers.settings import Settings
from anomaly_workers.types import Detection, Picture

BATCH = 16
"""Images scored together."""


@dataclass(frozen=True, slots=True)
class Result:
    """What was found in one file.

    Attributes:
        file: the image.
        score: anomaly score in [0, 1]; None if the file could not be read.
        threshold: operating point; None likewise.
        verdict: "anomaly", "normal" or "unreadable".
        regions: number of regions.
        reason: why it could not be read, else empty.
    """

    file: Path
    score: float | None
    threshold: float | None
    verdict: str
    regions: int
    reason: str = ""


def predict_files(
    files: Sequence[Path],
    *,
    out: Path,
    settings: Settings,
    normal: Path | None = None,
    model: Path | None = None,
    console: Console | None = None,
) -> list[Result]:
    """Write NAME-mask.png and NAME-heatmap.png for each file, and results.json, into `out`; print a table.

    A file that cannot be read gets its reason, and the others go on.

    Args:
        files: images, or folders of images.
        out: the folder to write to; made if needed.
        settings: detector, backbone, image size and limits, where no model is given.
        normal: folder of normal images to learn from.
        model: folder of a fitted version; excludes `normal`. Without either, the files themselves are learnt from,
            most of them taken as normal.
        console: where the table goes; nowhere by default.

    Raises:
        ConfigError: nothing to score, both `normal` and `model`, or fewer than two readable images to learn from.
        StoreError: the model is damaged.
    """
    console = console or Console(quiet=True)
    if normal and model:
        raise ConfigError("Give --normal or --model, not both.")
    wanted = expanded(files)
    out.mkdir(parents=True, exist_ok=True)
    detector = _detector(wanted, settings=settings, normal=normal, model=model)
    names = _names(wanted)
    results = []
    for file, outcome in _scored(wanted, detector, settings):
        results.append(_kept(file, outcome, out / names[file]))
    (out / "results.json").write_text(json.dumps([_as_json(result) for result in results], indent=1) + "\n")
    console.print(_table(results))
    return results


def expanded(files: Sequence[Path]) -> list[Path]:
    """Replace folders by the images in them; order stays, repeats go.

    Raises:
        ConfigError: nothing left.
    """
    found: dict[Path, None] = {}
    for file in files:
        found |= dict.fromkeys(image_files(file) if file.is_dir() else [file])
    if not found:
        raise ConfigError("There are no images to score. Name image files, or folders that hold some.")
    return list(found)


def _detector(wanted: Sequence[Path], *, settings: Settings, normal: Path | None, model: Path | None) -> Detector:
    device = choose_device(settings.device)
    if model:
        return detectors.load(model, device=device)
    detector = detectors.create(detectors.options(settings, device=device))
    sources = image_files(normal) if normal else wanted[: settings.max_fit_images]
    outcomes = [_loaded(file, detector.side, settings) for file in sources]
    pictures = [outcome for outcome in outcomes if isinstance(outcome, Picture)]
    if len(pictures) < 2:
        source = f"{normal} holds" if normal else "The files hold"
        raise ConfigError(f"{source} {len(pictures)} readable images to learn from. Give at least two, or --model.")
    detector.fit(pictures, confirmed=[True] * len(pictures) if normal else [])
    return detector


def _loaded(file: Path, side: int, settings: Settings) -> Picture | ImageError:
    try:
        return images.load(file, side=side, max_megapixels=settings.max_megapixels)
    except ImageError as error:
        return error


def _scored(
    files: Sequence[Path], detector: Detector, settings: Settings
) -> Iterator[tuple[Path, tuple[Picture, Detection] | ImageError]]:
    """Yield each file with its picture and detection, or with what is wrong with it, in order."""
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        loaded = [_loaded(file, detector.side, settings) for file in part]
        pictures = [outcome for outcome in loaded if isinstance(outcome, Picture)]
        detections = iter(detector.predict(pictures))
        for file, outcome in zip(part, loaded, strict=True):
            yield file, ((outcome, next(detections)) if isinstance(outcome, Picture) else outcome)


def _kept(file: Path, outcome: tuple[Picture, Detection] | ImageError, stem: Path) -> Result:
    """Write one file's pictures and say what was found."""
    if isinstance(outcome, ImageError):
        return Result(file, None, None, "unreadable", 0, str(outcome))
    picture, detection = outcome
    found = regions(detection)
    mask = np.zeros(detection.anomaly_map.shape, np.bool_)
    for region in found:
        mask |= region.mask
    drawn = images.heatmap(picture, detection.anomaly_map, detection.threshold)
    stem.with_name(f"{stem.name}-mask.png").write_bytes(images.mask_png(mask, picture.size))
    stem.with_name(f"{stem.name}-heatmap.png").write_bytes(drawn)
    verdict = "anomaly" if detection.is_anomaly else "normal"
    return Result(file, detection.score, detection.threshold, verdict, len(found))


def _names(files: Sequence[Path]) -> dict[Path, str]:
    """Return a name for each file's results, unique without regard to case."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for file in files:
        name, number = file.stem, 1
        while name.lower() in taken:
            number += 1
            name = f"{file.stem}-{number}"
        taken.add(name.lower())
        names[file] = name
    return names


def _as_json(result: Result) -> dict[str, str | float | int | None]:
    return {
        "file": str(result.file),
        "score": result.score,
        "threshold": result.threshold,
        "verdict": result.verdict,
        "regions": result.regions,
        "reason": result.reason,
    }


def _table(results: Sequence[Result]) -> Table:
    table = Table("file", "score", "verdict", "regions", "reason")
    for result in results:
        score = "-" if result.score is None else f"{result.score:.3f}"
        table.add_row(str(result.file), score, result.verdict, str(result.regions), result.reason)
    return table
