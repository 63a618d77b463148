"""Made-up defects: where they are, what they change, and that they can be repeated."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from anomaly_workers.refine.synthetic import DEFECTS, LARGEST, VISIBLE, synthesised
from anomaly_workers.types import Picture


def surface(seed: int, height: int = 96, width: int = 128) -> Picture:
    random = np.random.default_rng(seed)
    rows = 128 + 40 * np.sin(np.arange(height) / 5)[:, None, None] + random.normal(0, 12, (height, width, 3))
    return Picture(rows.clip(0, 255).astype(np.uint8), size=(2 * height, 2 * width))


def flat(grey: int) -> Picture:
    return Picture(np.full((64, 64, 3), grey, np.uint8), size=(64, 64))


def changes(before: Picture, after: Picture) -> np.ndarray[tuple[int, int], np.dtype[np.int16]]:
    """By how much each pixel differs, in grey levels."""
    return np.abs(after.pixels.astype(np.int16) - before.pixels).max(axis=-1)


def test_each_is_a_normal_image_that_changed_inside_the_mask() -> None:
    pictures = [surface(seed) for seed in range(6)]
    made = synthesised(pictures, 60, seed=1)
    assert len(made) == 60
    for one in made:
        before = pictures[one.origin]
        assert one.picture.size == before.size
        assert one.picture.pixels.dtype == np.uint8
        assert one.mask.sum() >= VISIBLE
        assert one.mask.mean() < 1.5 * LARGEST  # scars have no say in their area
        changed = changes(before, one.picture)
        assert (changed[one.mask] > VISIBLE).all()
        around = cv2.dilate(one.mask.astype(np.uint8), np.ones((15, 15))) > 0  # its edge is soft
        assert (changed[~around] <= 2 * VISIBLE).mean() > 0.99


def test_every_image_gets_its_share() -> None:
    made = synthesised([surface(seed) for seed in range(8)], 20)
    assert sorted(np.bincount([one.origin for one in made], minlength=8)) == [2, 2, 2, 2, 3, 3, 3, 3]


def test_the_same_seed_makes_the_same_defects_and_another_one_others() -> None:
    pictures = [surface(seed) for seed in range(4)]
    first, again, other = (synthesised(pictures, 8, seed=seed) for seed in (3, 3, 4))
    assert all(np.array_equal(a.picture.pixels, b.picture.pixels) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a.picture.pixels, b.picture.pixels) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", range(len(DEFECTS)))
def test_each_kind_can_be_seen(kind: int) -> None:
    made = synthesised([surface(seed) for seed in range(4)], 12, kinds=DEFECTS[kind : kind + 1])
    assert len(made) == 12
    assert len({one.mask.tobytes() for one in made}) == 12


def test_images_of_several_shapes_lend_each_other_texture() -> None:
    pictures = [surface(0, 40, 200), surface(1, 200, 40), surface(2, 64, 64)]
    for one in synthesised(pictures, 30, seed=2):
        assert one.picture.pixels.shape == pictures[one.origin].pixels.shape
        assert one.mask.shape == one.picture.pixels.shape[:2]


@pytest.mark.parametrize("grey", [0, 128, 255])
def test_flat_images_get_defects_too(grey: int) -> None:
    assert len(synthesised([flat(grey)], 10)) == 10


def test_where_nothing_can_be_changed_nothing_comes_back() -> None:
    tiny = Picture(np.zeros((2, 2, 3), np.uint8), size=(2, 2))  # four pixels are fewer than can be seen
    assert synthesised([tiny], 3) == []
    assert synthesised([], 3) == []
    assert synthesised([flat(9)], 0) == []
