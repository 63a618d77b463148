"""Synthesised defects: what a head is trained on besides the few confirmed ones. They are never scored.

Noise masks filled with foreign texture as in DRAEM (arXiv 2108.07610, section 3.2), cuts of other images and scars as
in CutPaste (arXiv 2104.04015, section 2.2), and what light, dirt and a moved part do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from anomaly_workers.types import Picture

SMALLEST, LARGEST = 0.0015, 0.06
"""Area of a blotch as a share of the image; every order of magnitude is as likely."""

VISIBLE = 8
"""Grey levels of 255 by which a pixel has to change to belong to the defect, and pixels that a defect has at least."""

ATTEMPTS = 20
"""How often another defect is tried where one cannot be seen."""

_Pixels = NDArray[np.float32] | NDArray[np.float64]
_Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Synthesised:
    """A normal image with a made-up defect.

    Attributes:
        picture: the changed image.
        mask: (h, w) bool, the pixels that changed visibly.
        origin: which of the normal images it was made of.
    """

    picture: Picture = field(repr=False)
    mask: _Mask = field(repr=False)
    origin: int


def _blotch(random: np.random.Generator, height: int, width: int) -> _Mask:
    """Return one or more spots with a ragged outline, near to each other."""
    area = np.exp(random.uniform(np.log(SMALLEST), np.log(LARGEST))) * height * width
    radius, stretch = np.sqrt(area) * random.uniform(0.8, 2), random.uniform(0.6, 1.7)
    rows, columns = np.ogrid[:height, :width]
    row, column = random.uniform(0.1, 0.9) * height, random.uniform(0.1, 0.9) * width
    far = ((rows - row) / (radius * stretch)) ** 2 + ((columns - column) / (radius / stretch)) ** 2
    level = _noise(random, height, width) - far
    return np.asarray(level > np.partition(level.ravel(), -max(1, int(area)))[-max(1, int(area))])


def _noise(random: np.random.Generator, height: int, width: int, octaves: int = 3) -> _Pixels:
    """Return smooth noise (h, w) with details of several sizes, like Perlin's."""
    cells, total = int(random.integers(2, 9)), np.zeros((height, width), np.float32)
    for octave in range(octaves):
        side = cells * 2**octave + 2
        coarse = random.standard_normal((side, side)).astype(np.float32)
        total += 0.5**octave * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return total


def _scar(random: np.random.Generator, height: int, width: int, pieces: int = 8) -> _Mask:
    """Return a thin bent line, drawn at twice the resolution so that it may be a pixel wide."""
    bends = random.uniform(0, 2 * np.pi) + np.cumsum(random.normal(0, 0.25, pieces))
    step = random.uniform(0.08, 0.6) * 2 * min(height, width) / pieces
    start = random.uniform(0.1, 0.9, 2) * (2 * width, 2 * height)
    points = start + np.cumsum(step * np.stack([np.cos(bends), np.sin(bends)], axis=-1), axis=0)
    canvas = np.zeros((2 * height, 2 * width), np.uint8)
    thick = int(random.integers(2, 9))
    cv2.polylines(canvas, [points.round().astype(np.int32)[:, None]], False, 255, thick)
    return np.asarray(cv2.resize(canvas, (width, height), interpolation=cv2.INTER_AREA) > 100)


def _foreign(random: np.random.Generator, whole: _Pixels, _mask: _Mask, other: NDArray[np.uint8]) -> _Pixels:
    """Texture of another image, turned, mostly enlarged, relit, and partly see-through."""
    texture = _relit(random, _cut(random, whole, other, larger=max(1.0, 1 / random.uniform(0.4, 1.5))))
    return whole + random.uniform(0.4, 1) * (texture - whole)


def _pasted(random: np.random.Generator, whole: _Pixels, _mask: _Mask, other: NDArray[np.uint8]) -> _Pixels:
    """A cut of another image's from elsewhere, relit every other time, and partly see-through."""
    piece = _cut(random, whole, other, larger=1.0)
    piece = _relit(random, piece) if random.random() < 0.5 else piece
    return whole + random.uniform(0.4, 1) * (piece - whole)


def _stained(random: np.random.Generator, whole: _Pixels, _mask: _Mask, _other: NDArray[np.uint8]) -> _Pixels:
    """Darker or brighter, now and then coloured, every other time grainy."""
    tint = random.uniform(0.6, 1, 3) if random.random() < 0.4 else np.ones(3)
    grain = random.normal(0, 0.06, whole.shape) if random.random() < 0.5 else 0.0
    return np.asarray(whole + random.choice([-1, 1]) * random.uniform(0.05, 0.5) * tint + grain, np.float32)


def _flattened(random: np.random.Generator, whole: _Pixels, mask: _Mask, _other: NDArray[np.uint8]) -> _Pixels:
    """Less or more contrast, and another brightness."""
    local = whole[mask].mean(axis=0)
    tint = random.uniform(0.3, 1, 3) if random.random() < 0.5 else np.ones(3)
    return np.asarray((whole - local) * random.uniform(0.2, 2.5) + local + random.uniform(-0.2, 0.2) * tint, np.float32)


def _moved(random: np.random.Generator, whole: _Pixels, _mask: _Mask, _other: NDArray[np.uint8]) -> _Pixels:
    """Blurred, or shifted by a few pixels."""
    if random.random() < 0.5:
        return np.asarray(cv2.GaussianBlur(whole, (0, 0), random.uniform(1.5, 5)), np.float32)
    reach = max(2, min(whole.shape[:2]) // 20)
    rows, columns = (int(step) for step in random.integers(-reach, reach + 1, 2))
    return np.asarray(np.roll(whole, (rows, columns), (0, 1)), np.float32)


_Shape = Callable[[np.random.Generator, int, int], _Mask]
_Fill = Callable[[np.random.Generator, _Pixels, _Mask, NDArray[np.uint8]], _Pixels]

DEFECTS: tuple[tuple[_Shape, _Fill], ...] = (
    (_blotch, _foreign),
    (_blotch, _pasted),
    (_scar, _stained),
    (_blotch, _flattened),
    (_blotch, _stained),
    (_blotch, _moved),
)
"""Shapes and what fills them; each is as likely."""


def synthesised(
    pictures: Sequence[Picture], count: int, *, kinds: Sequence[tuple[_Shape, _Fill]] = DEFECTS, seed: int = 0
) -> list[Synthesised]:
    """Return up to `count` defective images, made of as many different ones of `pictures` as there are.

    Fewer come back where no change can be seen. The same pictures and seed give the same defects.

    Args:
        pictures: normal images, of any sizes.
        count: how many, 0 or more.
        kinds: shapes and fills to draw from.
        seed: of all draws.
    """
    random = np.random.default_rng(seed)
    order: list[int] = []
    while pictures and len(order) < count:
        order += random.permutation(len(pictures)).tolist()
    found = [_defective(pictures, origin, random, kinds) for origin in order[:count]]
    return [one for one in found if one is not None]


def _defective(
    pictures: Sequence[Picture], origin: int, random: np.random.Generator, kinds: Sequence[tuple[_Shape, _Fill]]
) -> Synthesised | None:
    picture = pictures[origin]
    whole: _Pixels = picture.pixels.astype(np.float32) / 255
    for _ in range(ATTEMPTS):
        shape, fill = kinds[int(random.integers(len(kinds)))]
        mask = shape(random, whole.shape[0], whole.shape[1])
        if not mask.any():
            continue
        other = pictures[int(random.integers(len(pictures)))].pixels
        soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), random.uniform(0.3, 1.5))[..., None]
        mixed = whole + soft * (fill(random, whole, mask, other) - whole)
        pixels = (mixed.clip(0, 1) * 255).round().astype(np.uint8)
        changed = np.abs(pixels.astype(np.int16) - picture.pixels).max(axis=-1) > VISIBLE
        if (changed & mask).sum() >= VISIBLE:
            return Synthesised(Picture(pixels, picture.size), changed & mask, origin)
    return None


def _cut(random: np.random.Generator, whole: _Pixels, other: NDArray[np.uint8], *, larger: float) -> _Pixels:
    """Return pixels of another image in the shape of this one, turned, enlarged and rolled to a random place."""
    height, width = whole.shape[:2]
    turned = np.ascontiguousarray(np.rot90(other, int(random.integers(4))))
    size = (int(width * larger), int(height * larger))
    scaled = cv2.resize(turned, size)
    by = (int(random.integers(size[1])), int(random.integers(size[0])))
    return np.asarray(np.roll(scaled, by, (0, 1))[:height, :width], np.float32) / 255


def _relit(random: np.random.Generator, pixels: _Pixels) -> _Pixels:
    """Return pixels with another contrast, brightness and, now and then, colour, or inverted."""
    middle = pixels.mean()
    lit = (pixels - middle) * random.uniform(0.5, 1.8) + middle + random.uniform(-0.3, 0.3)
    if random.random() < 0.5:
        lit = lit * random.uniform(0.7, 1.3, 3)
    if random.random() < 0.3:
        lit = 1 - lit
    return np.asarray(lit.clip(0, 1), np.float32)
