"""Evaluation on folders made here, and on the measuring images beside the project."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from anomaly_workers import evaluate as evaluation
from anomaly_workers.errors import ConfigError, ImageError
from anomaly_workers.evaluate import COLUMNS, EvalOptions, class_folders, decoded, evaluate, read_class

SMALL = EvalOptions(image_size=64, device="cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def surface(seed: int, *, defect: bool = False) -> Image.Image:
    pixels = np.random.default_rng(seed).normal(120, 8, (64, 64))
    if defect:
        pixels[20:36, 20:36] = 255
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_class(folder: Path, *, masks: bool = True, train: int = 8) -> Path:
    for kind, count, start in (
        ("train/good", train, 0),
        ("test/good", 4, 100),
        ("test/spot", 4, 200),
        ("pool/spot", 3, 300),
    ):
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            surface(start + number, defect="spot" in kind).save(folder / kind / f"{number:03}.png")
    if masks:
        (folder / "ground_truth" / "spot").mkdir(parents=True)
        mask = np.zeros((64, 64), np.uint8)
        mask[20:36, 20:36] = 255
        for number in range(4):
            Image.fromarray(mask).save(folder / "ground_truth" / "spot" / f"{number:03}_mask.png")
    return folder


def test_figures_are_complete_and_written_as_agreed(tmp_path: Path) -> None:
    make_class(tmp_path / "a")
    make_class(tmp_path / "b", masks=False)
    printed = io.StringIO()

    figures = evaluate([tmp_path], SMALL, console=Console(file=printed, width=200))

    assert list(figures) == ["a", "b", "mean"]
    assert all(tuple(row) == COLUMNS for row in figures.values())
    assert figures["a"]["image_auroc"] == 1.0
    assert figures["a"]["pixel_auroc"] is not None
    assert figures["a"]["pixel_auroc"] > 0.9
    assert figures["b"]["aupro"] is None
    assert figures["mean"]["aupro"] == figures["a"]["aupro"]
    assert (figures["a"]["images_per_s"] or 0) > 0
    assert json.loads(json.dumps(figures)) == figures
    assert "mean" in printed.getvalue()
    assert "AUROC" in printed.getvalue()


def test_the_same_seed_gives_the_same_figures(tmp_path: Path) -> None:
    make_class(tmp_path / "a")
    times = {"fit_s", "images_per_s"}

    first, second = (evaluate([tmp_path / "a"], SMALL)["a"] for _ in range(2))

    assert {k: v for k, v in first.items() if k not in times} == {k: v for k, v in second.items() if k not in times}


def test_contamination_replaces_a_share_of_the_training_images(tmp_path: Path) -> None:
    one = read_class(make_class(tmp_path / "a"))

    files = evaluation._training_files(one, EvalOptions(contamination=0.25))

    assert len(files) == 8
    assert sum(file.parent.name == "spot" for file in files) == 2
    assert len(set(files)) == 8


def test_a_contaminated_class_still_evaluates(tmp_path: Path) -> None:
    make_class(tmp_path / "a", train=16)

    figures = evaluate([tmp_path / "a"], EvalOptions(image_size=64, device="cpu", contamination=0.1))

    assert figures["a"]["image_auroc"] == 1.0


def test_bad_folders_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MVTec"):
        class_folders([tmp_path])
    (tmp_path / "a" / "train" / "good").mkdir(parents=True)
    (tmp_path / "a" / "test").mkdir()
    with pytest.raises(ConfigError, match="at least two"):
        read_class(tmp_path / "a")
    make_class(tmp_path / "x" / "b")
    make_class(tmp_path / "y" / "b")
    with pytest.raises(ConfigError, match="differ"):
        class_folders([tmp_path / "x", tmp_path / "y"])
    with pytest.raises(ConfigError, match="Contamination"):
        evaluate([tmp_path / "x"], EvalOptions(contamination=1.5))


def test_a_class_without_pool_cannot_be_contaminated(tmp_path: Path) -> None:
    folder = make_class(tmp_path / "a")
    for file in (folder / "pool" / "spot").iterdir():
        file.unlink()

    with pytest.raises(ConfigError, match="pool"):
        evaluate([folder], EvalOptions(image_size=64, contamination=0.1))


def test_decoding_keeps_order_and_passes_errors_on(tmp_path: Path) -> None:
    files = []
    for number in range(37):
        files.append(tmp_path / f"{number}.png")
        Image.new("L", (32, 32), number).save(files[-1])

    batches = list(decoded(files, 32))

    assert [len(batch) for batch in batches] == [32, 5]
    assert [int(p.pixels[0, 0, 0]) for batch in batches for p in batch] == list(range(37))
    files[20].write_text("broken")
    with pytest.raises(ImageError):
        list(decoded(files, 32))


def test_alien_toy_is_told_apart(shared: Path) -> None:
    """The one class of photographs that is quick enough for a unit test; the whole table is in the README."""
    figures = evaluate([shared / "data" / "alien_toy"], EvalOptions(device="cpu", image_size=192))["alien_toy"]

    assert (figures["image_auroc"] or 0) > 0.97
    assert figures["aupro"] is None
