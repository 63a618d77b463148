"""One contract for every detector, and PatchCore against the few lines that define it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from anomaly_workers import detectors
from anomaly_workers.detectors import padim, patchcore
from anomaly_workers.detectors.base import Detector, Options
from anomaly_workers.detectors.coldstart import LEFT_OUT, trusted
from anomaly_workers.detectors.maps import raw_maps, raw_scores
from anomaly_workers.detectors.patches import patch_grids
from anomaly_workers.detectors.patchwise import PatchwiseDetector
from anomaly_workers.detectors.regions import regions
from anomaly_workers.errors import Cancelled, ConfigError, NotFitted, StoreError
from anomaly_workers.types import Detection, Picture

Pictures = list[Picture]


def surface(seed: int, *, shape: tuple[int, int] = (96, 96), defect: bool = False) -> Picture:
    """A striped, slightly noisy surface; the defect is a dark blot with a bright rim."""
    random = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    grey = 120 + 40 * np.sin(columns / 4 + random.normal(0, 0.2)) + random.normal(0, 6, shape)
    if defect:
        away = np.hypot(rows - shape[0] * 0.5, columns - shape[1] * 0.25)
        grey[away < 16] = 250
        grey[away < 11] = 10
    pixels = np.clip(grey, 0, 255).astype(np.uint8)[..., None].repeat(3, -1)
    return Picture(pixels, size=(shape[0] * 4, shape[1] * 4))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def normals() -> Pictures:
    return [surface(seed) for seed in range(12)]


@pytest.fixture(params=sorted(detectors.DETECTORS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def fitted(normals: Pictures) -> Callable[[str], Detector]:
    """Fit each detector once for all tests that only look."""
    cache: dict[str, Detector] = {}

    def get(name: str) -> Detector:
        if name not in cache:
            cache[name] = detectors.create(Options(detector=name, image_size=96))
            cache[name].fit(normals, confirmed=[True] * len(normals))
        return cache[name]

    return get


def test_defects_score_higher_than_normals(name: str, fitted: Callable[[str], Detector]) -> None:
    good, bad = fitted(name).predict([surface(50)]), fitted(name).predict([surface(51, defect=True)])

    assert bad[0].is_anomaly
    assert not good[0].is_anomaly
    assert 0 <= good[0].score < bad[0].score < 1


def test_the_map_points_at_the_defect(name: str, fitted: Callable[[str], Detector]) -> None:
    (found,) = fitted(name).predict([surface(51, defect=True)])

    row, column = np.unravel_index(int(found.anomaly_map.argmax()), found.anomaly_map.shape)
    assert found.anomaly_map.shape == (96, 96)
    assert found.anomaly_map.dtype == np.float32
    assert 0 <= found.anomaly_map.min() <= found.anomaly_map.max() <= 1
    assert np.hypot(row - 48, column - 24) < 20
    assert found.size == (384, 384)


def test_shapes_mix_and_order_stays(name: str, fitted: Callable[[str], Detector]) -> None:
    mixed = [
        surface(1),
        surface(2, shape=(64, 128), defect=True),
        surface(3),
        surface(4, shape=(64, 128)),
        surface(5, shape=(32, 32)),
    ]

    together = fitted(name).predict(mixed)
    alone = [fitted(name).predict([picture])[0] for picture in mixed]

    assert [d.anomaly_map.shape for d in together] == [p.pixels.shape[:2] for p in mixed]
    assert [d.score for d in together] == pytest.approx([d.score for d in alone], abs=1e-4)
    assert together[1].score > together[3].score
    assert fitted(name).predict([]) == []


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(threads: int, fitted: Callable[[str], Detector], normals: Pictures) -> None:
    expected = [d.score for d in fitted("patchcore").predict(normals)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        scores = [d.score for d in fitted("patchcore").predict(normals)]
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)

    assert scores == pytest.approx(expected, abs=1e-5)


def test_saved_and_loaded_predicts_the_same(
    name: str, fitted: Callable[[str], Detector], tmp_path: Path, normals: Pictures
) -> None:
    fitted(name).save(tmp_path)

    loaded = detectors.load(tmp_path)

    pictures = [normals[0], surface(51, defect=True)]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["detector.json", "detector.safetensors"]
    assert (loaded.side, loaded.threshold) == (96, fitted(name).threshold)
    for a, b in zip(fitted(name).predict(pictures), loaded.predict(pictures), strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-5)
        assert np.allclose(a.anomaly_map, b.anomaly_map, atol=1e-5)


def test_damaged_files_are_told(name: str, fitted: Callable[[str], Detector], tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        detectors.load(tmp_path)
    fitted(name).save(tmp_path)
    (tmp_path / "detector.safetensors").write_bytes(b"nonsense")
    with pytest.raises(StoreError):
        detectors.DETECTORS[name].load(tmp_path)
    card = json.loads((tmp_path / "detector.json").read_text())
    card["options"]["detector"] = "unheard-of"
    (tmp_path / "detector.json").write_text(json.dumps(card))
    with pytest.raises(StoreError, match="unheard-of"):
        detectors.load(tmp_path)


def test_unfitted_raises(name: str, tmp_path: Path) -> None:
    detector = detectors.create(Options(detector=name, image_size=96))

    with pytest.raises(NotFitted):
        detector.predict([surface(0)])
    with pytest.raises(NotFitted):
        detector.save(tmp_path)


def test_what_cannot_be_fitted_is_refused(name: str) -> None:
    detector = detectors.create(Options(detector=name, image_size=96))

    with pytest.raises(ConfigError, match="two pictures"):
        detector.fit([surface(0)])
    with pytest.raises(ConfigError, match="flags"):
        detector.fit([surface(0), surface(1)], confirmed=[True])


@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_few_pictures_are_enough(name: str, count: int) -> None:
    detector = detectors.create(Options(detector=name, image_size=96))

    detector.fit([surface(seed) for seed in range(count)])

    good, bad = detector.predict([surface(50), surface(51, defect=True)])
    assert good.score < bad.score
    assert bad.is_anomaly


def test_training_shapes_may_differ(name: str) -> None:
    detector = detectors.create(Options(detector=name, image_size=96))

    detector.fit([surface(seed, shape=(96, 96) if seed % 3 else (64, 128)) for seed in range(8)])

    good, bad = detector.predict([surface(50, shape=(64, 128)), surface(51, shape=(64, 128), defect=True)])
    assert good.score < bad.score


def test_seed_decides(name: str, normals: Pictures) -> None:
    scores = []
    for seed in (1, 1, 2):
        detector = detectors.create(Options(detector=name, image_size=96, seed=seed))
        detector.fit(normals)
        scores.append(detector.predict([surface(51, defect=True)])[0].score)

    assert scores[0] == scores[1] != scores[2]


def test_progress_rises_to_one_and_can_cancel(name: str, normals: Pictures) -> None:
    detector = detectors.create(Options(detector=name, image_size=96))
    heard: list[float] = []

    def stop(fraction: float, stage: str) -> None:
        assert stage
        if fraction > 0.6:
            raise Cancelled("stopped")

    detector.fit(normals, progress=lambda fraction, _stage: heard.append(fraction))
    assert heard == sorted(heard)
    assert heard[-1] == 1.0
    assert len(heard) > 4
    with pytest.raises(Cancelled):
        detector.fit(normals, progress=stop)


def test_defects_among_unlabelled_pictures_are_still_found(name: str) -> None:
    pictures = [surface(seed, defect=seed % 8 == 0) for seed in range(32)]  # 12.5 %, and all alike
    detector = detectors.create(Options(detector=name, image_size=96))

    detector.fit(pictures)

    found = detector.predict(pictures)
    bad = [d for seed, d in enumerate(found) if seed % 8 == 0]
    good = [d for seed, d in enumerate(found) if seed % 8]
    assert all(d.is_anomaly for d in bad)
    assert sum(d.is_anomaly for d in good) <= 2


def patches_of(detector: Detector, pictures: Pictures) -> list[torch.Tensor]:
    return [one.patches[0] for one in patch_grids(cast("PatchwiseDetector", detector).backbone, pictures)]


def test_confirmed_pictures_are_never_left_out(normals: Pictures) -> None:
    odd = surface(99, defect=True)
    detector = detectors.create(Options(image_size=96))
    grids = patches_of(detector, [*normals, odd])

    assert trusted(grids, [False] * 13, seed=0)[-1] != 12
    assert trusted(grids, [False] * 12 + [True], seed=0)[-1] == 12


def test_the_oddest_of_the_unlabelled_pictures_are_left_out() -> None:
    pictures = [surface(seed, defect=seed < 3) for seed in range(40)]
    detector = detectors.create(Options(image_size=96))
    grids = patches_of(detector, pictures)

    kept = trusted(grids, [False] * 40, seed=0)
    with_normals = trusted(grids, [seed >= 20 for seed in range(40)], seed=0)

    assert len(kept) == 40 - round(LEFT_OUT * 40)
    assert not {0, 1, 2} & {*kept, *with_normals}
    assert len(with_normals) == 40 - round(LEFT_OUT * 20)
    assert set(range(20, 40)) <= set(with_normals)


def test_an_unlabelled_picture_does_not_vouch_for_itself(normals: Pictures, tmp_path: Path) -> None:
    odd = surface(99, defect=True)
    unlabelled, confirmed = (detectors.create(Options("patchcore", image_size=96)) for _ in range(2))

    unlabelled.fit([*normals[:3], odd])  # too few to leave any out
    confirmed.fit([*normals[:3], odd], confirmed=[True] * 4)

    unlabelled.save(tmp_path)
    (alone,), (loaded,) = unlabelled.predict([odd]), detectors.load(tmp_path).predict([odd])
    assert alone.score == pytest.approx(loaded.score, abs=1e-5)
    assert alone.score > unlabelled.predict([normals[0]])[0].score
    assert confirmed.predict([odd])[0].score < alone.score - 0.1


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match="patchcore"):
        detectors.create(Options(detector="magic"))


def test_options_follow_the_settings() -> None:
    from anomaly_workers.settings import load_settings

    settings = load_settings({"ANOMALY_DETECTOR": "padim", "ANOMALY_IMAGE_SIZE": "128", "ANOMALY_TARGET_FPR": "0.02"})

    options = detectors.options(settings, device="cpu")

    assert options == Options(detector="padim", image_size=128, target_fpr=0.02)


def naive_patchcore(train: NDArray[np.float32], test: NDArray[np.float32]) -> tuple[float, NDArray[np.float64]]:
    """Distance of each patch of test (h, w, d) to the nearest of train (n, d), smoothed; mean of the top 1 %."""
    from scipy.ndimage import gaussian_filter

    gaps = np.empty(test.shape[:2])
    for row in range(test.shape[0]):
        for column in range(test.shape[1]):
            gaps[row, column] = np.sqrt(((train - test[row, column]) ** 2).sum(1)).min()
    smooth = gaussian_filter(gaps, 0.5, mode="nearest", radius=2)
    top = np.sort(smooth.ravel())[::-1][: max(1, round(0.01 * smooth.size))]
    return float(top.mean()), smooth


def test_what_looks_like_a_confirmed_defect_is_left_out_before_what_is_merely_odd() -> None:
    random = np.random.default_rng(0)
    *normals, shown, like = [torch.from_numpy(random.normal(0, 0.1, (16, 16, 8))).float() for _ in range(42)]
    for place, odd in enumerate(normals[-4:]):
        odd[4:9, 4:9, place] += 1.1
    for grid in (shown, like):
        grid[4:9, 4:9, 7] += 1
    grids, confirmed = [*normals, like], [True] * 20 + [False] * 21

    alone = trusted(grids, confirmed, seed=0)
    told = trusted(grids, confirmed, defects=[shown], seed=0)

    assert len(told) == len(alone) == 41 - round(LEFT_OUT * 21)
    assert 40 in alone
    assert 40 not in told


def test_patchcore_equals_its_definition(normals: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patchcore, "FEWEST", 10**6)  # every patch is remembered, so that no choice intervenes
    monkeypatch.setattr(patchcore, "MOST", 10**6)
    detector = detectors.DETECTORS["patchcore"](Options(image_size=96))
    detector.fit(normals, confirmed=[True] * 12)
    picture = surface(51, defect=True)
    train = torch.cat([grid.flatten(0, 1) for grid in patches_of(detector, normals)]).numpy()
    (test,) = patches_of(detector, [picture])

    (found,) = detector.predict([picture])

    raw, smooth = naive_patchcore(train, test.numpy())
    assert detector._calibration is not None
    assert found.score == pytest.approx(detector._calibration.score(raw), abs=1e-3)
    expected = raw_maps_of(smooth, (96, 96))
    assert np.allclose(found.anomaly_map, detector._calibration(expected), atol=2e-3)


def raw_maps_of(smooth: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float32]:
    grid = torch.from_numpy(smooth.astype(np.float32))[None, None]
    enlarged: torch.Tensor = torch.nn.functional.interpolate(grid, size=size, mode="bilinear")
    return enlarged[0, 0].numpy()


def test_the_raw_score_stays_under_the_maps_peak() -> None:
    distances = torch.rand(4, 32, 32, generator=torch.Generator().manual_seed(0))

    assert (raw_scores(distances) < raw_maps(distances, (256, 256)).amax(dim=(1, 2))).all()
    assert torch.allclose(raw_maps(torch.full((1, 4, 4), 3.0), (32, 32)), torch.tensor(3.0))


def detection(anomaly_map: NDArray[np.float32], score: float = 0.9) -> Detection:
    return Detection(score=score, threshold=0.5, anomaly_map=anomaly_map, size=(100, 100))


def test_regions_are_components_highest_first() -> None:
    values = np.zeros((50, 50), np.float32)
    values[5:15, 5:15] = 0.7
    values[30:40, 30:40] = 0.9
    values[45, 2] = 0.95  # a speck

    found = regions(detection(values), min_share=0.001)

    assert [round(region.score, 2) for region in found] == [0.9, 0.7]
    assert [int(region.mask.sum()) for region in found] == [100, 100]


def test_a_normal_image_has_no_region_and_an_anomaly_at_least_one() -> None:
    speck = np.zeros((50, 50), np.float32)
    speck[3, 3] = 0.8

    assert regions(detection(speck, score=0.4)) == []
    assert len(regions(detection(speck), min_share=0.01)) == 1
    assert len(regions(detection(np.full((8, 8), 0.3, np.float32)))) == 1


def test_regions_are_bounded() -> None:
    values = np.zeros((64, 64), np.float32)
    values[::4, ::4] = 0.6 + np.arange(256, dtype=np.float32).reshape(16, 16) / 1000

    found = regions(detection(values), min_share=0.0)

    assert len(found) == 32
    assert found[0].score == pytest.approx(0.855)


def test_options_are_values() -> None:
    assert replace(Options(), seed=3) == Options(seed=3)


@pytest.mark.parametrize("kind", ["patchcore", "patchcore-padim"])
def test_what_counts_as_normal_is_calm_and_comes_back_exactly(kind: str, fitted: Callable[[str], Detector]) -> None:
    detector = fitted(kind)
    alarm, normal = surface(51, defect=True), surface(50)
    [before, quiet] = detector.predict([alarm, normal])
    patches = detector.quietening(alarm)
    try:
        detector.take_as_normal(patches)
        [calm, still] = detector.predict([alarm, normal])
        assert before.is_anomaly
        assert not calm.is_anomaly
        assert not calm.anomaly_map.max() >= calm.threshold
        assert still.score == pytest.approx(quiet.score, abs=0.02), "other pictures keep their score"
        assert detector.is_quietened(before.hottest, patches)
        assert detector.is_quietened(calm.hottest, patches), "or nobody would find it when the rejection is taken back"
        assert not detector.is_quietened(before.hottest, patches[:0])
        assert not detector.is_quietened(before.hottest, np.flip(patches, axis=1).copy()), (
            "these look like nothing in it"
        )
    finally:
        detector.take_as_normal(patches[:0])
    assert detector.predict([alarm, normal])[0].score == before.score


def test_only_the_rejected_place_counts_as_normal(fitted: Callable[[str], Detector]) -> None:
    detector = fitted("patchcore")
    alarm = surface(51, defect=True)
    elsewhere, there = np.zeros((48, 48), np.bool_), np.zeros((48, 48), np.bool_)
    elsewhere[:8, 40:] = True
    there[14:34, 2:22] = True
    assert len(detector.quietening(alarm, elsewhere)) < len(detector.quietening(alarm, there))
    assert 0 < len(detector.quietening(alarm, there)) <= len(detector.quietening(alarm))


def test_a_method_that_cannot_learn_at_once_stays_as_it_is(fitted: Callable[[str], Detector]) -> None:
    detector = fitted("padim")
    alarm = surface(51, defect=True)
    [before] = detector.predict([alarm])
    assert len(detector.quietening(alarm)) == 0
    assert not detector.is_quietened(before.hottest, before.hottest)
    detector.take_as_normal(before.hottest)
    assert detector.predict([alarm])[0].score == before.score


def test_a_learnt_grid_is_taken_out_of_its_gaussians(normals: Pictures) -> None:
    grids = torch.randn(90, 3, 3, 40, generator=torch.Generator().manual_seed(0))
    whole, others = padim.Gaussians.learn(list(grids), seed=0), padim.Gaussians.learn(list(grids[1:]), seed=0)

    plain = float(whole.distances(grids[:1]).mean())
    left_out = float(whole.distances(grids[:1], without=[(0,)]).mean())

    assert left_out == pytest.approx(float(others.distances(grids[:1]).mean()), rel=0.05)
    assert left_out > 1.2 * plain
    assert float(whole.distances(grids[:1], without=[()]).mean()) == plain
