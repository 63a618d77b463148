"""Scoring files without Label Studio."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from anomaly_workers import detectors, images
from anomaly_workers.errors import ConfigError, StoreError
from anomaly_workers.offline import predict_files
from anomaly_workers.settings import Settings, load_settings

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def settings() -> Settings:
    return load_settings({}, image_size=64, device="cpu")


def surface(seed: int, *, defect: bool = False) -> Image.Image:
    pixels = np.random.default_rng(seed).normal(120, 8, (80, 120))
    if defect:
        pixels[20:44, 20:44] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six good images, a defect and a file that is no image."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(6):
        surface(number).save(folder / f"good{number}.png")
    surface(9, defect=True).save(folder / "odd.png")
    (folder / "text.png").write_text("not an image")
    return folder


@pytest.fixture
def normal(tmp_path: Path) -> Path:
    folder = tmp_path / "normal"
    folder.mkdir()
    for number in range(20, 28):
        surface(number).save(folder / f"{number}.png")
    return folder


def test_normal_images_teach_and_files_appear(folder: Path, normal: Path, tmp_path: Path, settings: Settings) -> None:
    out, printed = tmp_path / "out", io.StringIO()

    results = predict_files(
        [folder], out=out, settings=settings, normal=normal, console=Console(file=printed, width=250)
    )

    verdicts = {result.file.name: result.verdict for result in results}
    assert verdicts["odd.png"] == "anomaly"
    assert verdicts["text.png"] == "unreadable"
    assert verdicts["good0.png"] == "normal"
    mask = np.asarray(Image.open(out / "odd-mask.png"))
    assert mask.shape == (80, 120)
    assert mask[32, 32] == 255
    assert mask[70, 100] == 0
    assert not np.asarray(Image.open(out / "good0-mask.png")).any()
    assert (out / "odd-heatmap.png").is_file()
    assert not (out / "text-mask.png").exists()
    written = {Path(row["file"]).name: row for row in json.loads((out / "results.json").read_text())}
    assert written["odd.png"]["score"] > written["good0.png"]["score"]
    assert "Not a readable image" in written["text.png"]["reason"]
    assert "Not a readable image" in printed.getvalue()


def test_cold_start_learns_from_the_files_themselves(folder: Path, tmp_path: Path, settings: Settings) -> None:
    results = predict_files([folder], out=tmp_path / "out", settings=settings)

    scores = {result.file.name: result.score for result in results if result.score is not None}
    assert max(scores, key=scores.__getitem__) == "odd.png"


def test_a_fitted_model_is_used(folder: Path, normal: Path, tmp_path: Path, settings: Settings) -> None:
    detector = detectors.create(detectors.options(settings, device="cpu"))
    detector.fit([images.load(file, side=64) for file in sorted(normal.iterdir())], confirmed=[True] * 8)
    (tmp_path / "model").mkdir()
    detector.save(tmp_path / "model")

    (result,) = predict_files([folder / "odd.png"], out=tmp_path / "out", settings=settings, model=tmp_path / "model")

    assert result.verdict == "anomaly"


def test_equal_names_do_not_overwrite_each_other(normal: Path, tmp_path: Path, settings: Settings) -> None:
    files = []
    for name in ("a/x.png", "b/x.png", "b/X.jpg"):
        files.append(tmp_path / name)
        files[-1].parent.mkdir(exist_ok=True)
        surface(1).save(files[-1])

    predict_files(files, out=tmp_path / "out", settings=settings, normal=normal)

    assert {p.name for p in (tmp_path / "out").glob("*-mask.png")} == {"x-mask.png", "x-2-mask.png", "X-3-mask.png"}


def test_what_cannot_work_says_so(folder: Path, normal: Path, tmp_path: Path, settings: Settings) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()

    with pytest.raises(ConfigError, match="not both"):
        predict_files([folder], out=out, settings=settings, normal=normal, model=normal)
    with pytest.raises(ConfigError, match="no images"):
        predict_files([empty], out=out, settings=settings)
    with pytest.raises(ConfigError, match="at least two"):
        predict_files([folder / "odd.png"], out=out, settings=settings)
    with pytest.raises(StoreError):
        predict_files([folder], out=out, settings=settings, model=empty)
