"""Metrics, in closed form and against the few lines that define them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from anomaly_workers import metrics

Masks = list[NDArray[np.bool_]]
Maps = list[NDArray[np.float64]]


def naive_aupro(masks: Masks, maps: Maps, limit: float) -> float:
    components = []
    for index, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        components += [(index, labels == number) for number in range(1, count + 1)]
    fprs, overlaps = [0.0], [0.0]
    for threshold in np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]:
        found = [m >= threshold for m in maps]
        false = sum((f & ~mask).sum() for f, mask in zip(found, masks, strict=True))
        fprs.append(false / sum((~mask).sum() for mask in masks))
        overlaps.append(float(np.mean([found[index][part].mean() for index, part in components])))
    grid = np.unique([*[f for f in fprs if f <= limit], limit])
    upper = [max(o for f, o in zip(fprs, overlaps, strict=True) if f == g) if g in fprs else None for g in grid]
    area = 0.0
    points = [(f, o) for f, o in zip(fprs, overlaps, strict=True) if f <= limit]
    if upper[-1] is None:
        points.append((limit, float(np.interp(limit, fprs, overlaps))))
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def scene(seed: int, levels: int = 0) -> tuple[Masks, Maps]:
    random = np.random.default_rng(seed)
    masks, maps = [], []
    for _ in range(3):
        mask = np.zeros((20, 24), np.bool_)
        mask[2:5, 3:9] = True
        mask[12:18, random.integers(1, 15) :][:, :4] = True
        values = random.random((20, 24)) + 0.4 * mask
        masks.append(mask)
        maps.append(np.round(values * levels) / levels if levels else values)
    return masks, maps


@pytest.mark.parametrize(("seed", "levels", "limit"), [(0, 0, 0.3), (1, 0, 0.05), (2, 7, 0.3), (3, 3, 1.0)])
def test_aupro_equals_the_definition(seed: int, levels: int, limit: float) -> None:
    masks, maps = scene(seed, levels)

    assert metrics.aupro(masks, maps, limit=limit) == pytest.approx(naive_aupro(masks, maps, limit), abs=1e-9)


def test_perfect_maps_have_an_aupro_of_one() -> None:
    masks, _ = scene(0)

    assert metrics.aupro(masks, [mask.astype(np.float64) for mask in masks]) == pytest.approx(1.0)


def test_a_constant_map_has_the_aupro_of_chance() -> None:
    masks, _ = scene(0)

    assert metrics.aupro(masks, [np.zeros(mask.shape) for mask in masks], limit=0.3) == pytest.approx(0.15)


def test_a_small_region_counts_as_much_as_a_large_one() -> None:
    mask = np.zeros((40, 40), np.bool_)
    mask[0:20, 0:20] = True
    mask[30, 30] = True
    values = np.zeros((40, 40))
    values[0:20, 0:20] = 1.0  # the large one is found at once, the small one by chance only

    assert metrics.aupro([mask], [values], limit=1.0) == pytest.approx(0.5 + 0.25)


def test_no_regions_give_no_aupro() -> None:
    assert metrics.aupro([np.zeros((4, 4), np.bool_)], [np.ones((4, 4))]) is None


def test_image_metrics_in_closed_form() -> None:
    labels = np.array([False, False, True, True])
    scores = np.array([0.1, 0.6, 0.5, 0.9])

    assert metrics.auroc(labels, scores) == pytest.approx(0.75)
    assert metrics.average_precision(labels, scores) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert metrics.f1_max(labels, scores) == pytest.approx(0.8)
    assert metrics.rates(labels, scores >= 0.55) == (0.5, 0.5)


def test_one_kind_alone_gives_none() -> None:
    labels, scores = np.zeros(3, np.bool_), np.ones(3)

    assert metrics.auroc(labels, scores) is None
    assert metrics.average_precision(labels, scores) is None
    assert metrics.f1_max(labels, scores) is None
    assert metrics.rates(labels, scores > 2) == (0.0, None)


def test_pixel_auroc_counts_pixels_of_all_images() -> None:
    masks, _ = scene(0)

    assert metrics.pixel_auroc(masks, [mask.astype(np.float64) for mask in masks]) == 1.0
