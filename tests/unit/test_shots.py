"""`eval --shots` on generated washers: the JSON that was promised, and nothing learnt from what is held back."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from anomaly_workers import sample, shots
from anomaly_workers.errors import ConfigError
from anomaly_workers.evaluate import EvalOptions, read_class
from anomaly_workers.shots import ShotOptions, evaluate_shots

SMALL = EvalOptions(image_size=96, detector="patchcore", device="cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def washers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "washers"
    random = np.random.default_rng(0)
    for kind, defect, count in (
        ("train/good", "good", 12),
        ("test/good", "good", 4),
        ("test/chip", "chip", 3),
        ("test/stain", "stain", 3),
        ("pool/chip", "chip", 4),
        ("pool/stain", "stain", 4),
    ):
        (folder / kind).mkdir(parents=True)
        for number in range(count):
            picture = sample.washer(random, defect=defect).resize((128, 128))
            picture.save(folder / kind / f"{kind[:2]}{number}.png")
    return folder


def test_the_figures_of_each_kind_come_with_mean_and_deviation(washers: Path) -> None:
    figures = evaluate_shots([washers], SMALL, ShotOptions(shots=(0, 4), seeds=2))
    found = figures["washers"]["shots"]
    assert set(found) == {"0", "4"}
    for count in found:
        for kind in ("bank", "head", "fused"):
            assert set(found[count][kind]["image_auroc"]) == {"mean", "std"}
            assert 0 <= found[count][kind]["image_auroc"]["mean"] <= 1
            assert found[count][kind]["aupro"] is None, "there are no masks"
    assert found["0"]["fused"] == found["0"]["bank"] == found["4"]["bank"]
    assert found["4"]["head"] != found["4"]["bank"]
    assert 0 <= found["4"]["promoted"] <= 1
    assert figures["mean"]["shots"]["4"]["fused"]["image_auroc"]["mean"] == pytest.approx(
        found["4"]["fused"]["image_auroc"]["mean"]
    )


def test_a_draw_repeats_and_an_unseen_type_is_never_drawn(washers: Path) -> None:
    one = read_class(washers)
    assert shots._draw(one, 3, 1, "") == shots._draw(one, 3, 1, "") != shots._draw(one, 3, 2, "")
    assert shots._draw(one, 5, 1, "")[:3] == shots._draw(one, 3, 1, ""), "more shots hold the fewer"
    assert {path.parent.name for path in shots._draw(one, 4, 0, "stain")} == {"chip"}


def test_an_unseen_type_is_measured_alone(washers: Path) -> None:
    one = read_class(washers)
    left = shots._only(one, "stain")
    assert {path.parent.name for path in left.test} == {"good", "stain"}
    assert [path for path, bad in zip(left.test, left.labels, strict=True) if not bad] == [
        path for path, bad in zip(one.test, one.labels, strict=True) if not bad
    ]
    assert len(left.test) == len(left.labels) == len(left.masks) < len(one.test)


@pytest.mark.parametrize(
    ("drawn", "reason"),
    [
        (ShotOptions(shots=(9,)), "8 defects in pool/"),
        (ShotOptions(shots=(1,), unseen="rust"), "chip, stain"),
    ],
)
def test_what_cannot_be_drawn_is_said(washers: Path, drawn: ShotOptions, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        evaluate_shots([washers], SMALL, drawn)


def test_a_method_that_learns_no_defects_is_refused(washers: Path) -> None:
    with pytest.raises(ConfigError, match="patchcore-padim"):
        evaluate_shots([washers], EvalOptions(image_size=96, detector="padim"), ShotOptions(shots=(1,), seeds=1))


def test_normal_images_that_are_there_twice_change_nothing(washers: Path, tmp_path: Path) -> None:
    twice = tmp_path / "washers"
    shutil.copytree(washers, twice)
    for file in sorted((twice / "train/good").iterdir()):
        shutil.copy(file, file.with_name(f"z{file.name}"))

    alone, both = (evaluate_shots([one], SMALL, ShotOptions(shots=(4,), seeds=1)) for one in (washers, twice))

    for kind in ("bank", "head"):
        once, again = (figures["washers"]["shots"]["4"][kind] for figures in (alone, both))
        for column in ("image_ap", "threshold", "recall_at_threshold", "fpr_at_threshold"):
            assert again[column] == once[column], (kind, column)
