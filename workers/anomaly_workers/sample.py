"""Generated sample images: brushed steel washers, some with a scratch, a stain or a chipped edge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIDE = 320
COUNTS = {"train/good": 40, "test/good": 24, "test/scratch": 8, "test/stain": 8, "test/chip": 8}
"""Images a folder, in MVTec's layout."""

Generator = np.random.Generator


def write(folder: Path, *, seed: int = 7) -> Path:
    """Write the sample class into `folder`, MVTec layout, JPEG; return the folder."""
    random = np.random.default_rng(seed)
    for name, count in COUNTS.items():
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            washer(random, defect=name.rsplit("/", 1)[1]).save(target / f"{index:03}.jpg", quality=92)
    return folder


def washer(random: Generator, *, defect: str = "good") -> Image.Image:
    """Draw one washer, (SIDE, SIDE) RGB; `defect` is "good", "scratch", "stain" or "chip"."""
    centre = SIDE / 2 + random.uniform(-6, 6, size=2)
    outer, inner = 118 + random.uniform(-2, 2), 50 + random.uniform(-1.5, 1.5)
    steel = _steel(random, centre)
    ring = _ring(centre, outer, inner)
    picture = Image.composite(steel, _bench(random), ring)
    if defect != "good":
        DEFECTS[defect](random, picture, centre, (outer, inner))
    noise = random.normal(0, 2.0, (SIDE, SIDE, 1))
    pixels = np.asarray(picture, dtype=np.float64) * random.uniform(0.94, 1.06) + noise
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _steel(random: Generator, centre: NDArray[np.float64]) -> Image.Image:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    radius = np.hypot(columns - centre[0], rows - centre[1])
    angle = np.arctan2(rows - centre[1], columns - centre[0])
    grooves = random.normal(0, 1, 400)[np.clip(radius * 2, 0, 399).astype(int)] * 5
    shine = 26 * np.cos(2 * (angle - 0.9)) + 10 * np.cos(4 * (angle - 0.4))
    grey = 158 + grooves + shine
    return Image.fromarray(np.clip(np.stack([grey, grey + 2, grey + 7], axis=-1), 0, 255).astype(np.uint8))


def _bench(random: Generator) -> Image.Image:
    grain = Image.fromarray(np.clip(random.normal(64, 12, (SIDE, SIDE)), 0, 255).astype(np.uint8))
    soft = np.asarray(grain.filter(ImageFilter.GaussianBlur(1.2)), dtype=np.float64)
    return Image.fromarray(np.stack([soft * 0.92, soft, soft * 1.08], axis=-1).astype(np.uint8))


def _ring(centre: NDArray[np.float64], outer: float, inner: float) -> Image.Image:
    ring = Image.new("L", (SIDE * 2, SIDE * 2))
    draw = ImageDraw.Draw(ring)
    for radius, fill in ((outer, 255), (inner, 0)):
        draw.ellipse([*(2 * (centre - radius)), *(2 * (centre + radius))], fill=fill)
    return ring.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _place(random: Generator, centre: NDArray[np.float64], radii: tuple[float, float]) -> NDArray[np.float64]:
    angle, radius = random.uniform(0, 2 * np.pi), random.uniform(radii[1] + 18, radii[0] - 18)
    return centre + radius * np.array([np.cos(angle), np.sin(angle)])


def _scratch(random: Generator, picture: Image.Image, centre: NDArray[np.float64], radii: tuple[float, float]) -> None:
    start, angle = _place(random, centre, radii), random.uniform(0, np.pi)
    length, bend = random.uniform(35, 70), random.uniform(-0.35, 0.35)
    steps = np.linspace(-0.5, 0.5, 12)
    points = [tuple(start + length * t * np.array([np.cos(angle + bend * t), np.sin(angle + bend * t)])) for t in steps]
    draw = ImageDraw.Draw(picture)
    draw.line([(x + 1, y + 1) for x, y in points], fill=(84, 86, 92), width=2)
    draw.line(points, fill=(226, 228, 232), width=2)


def _stain(random: Generator, picture: Image.Image, centre: NDArray[np.float64], radii: tuple[float, float]) -> None:
    place, size = _place(random, centre, radii), random.uniform(9, 16)
    blot = Image.new("L", picture.size)
    draw = ImageDraw.Draw(blot)
    for _ in range(7):
        spot, radius = place + random.normal(0, size / 3, 2), random.uniform(size / 3, size / 1.6)
        draw.ellipse([*(spot - radius), *(spot + radius)], fill=165)
    rust = Image.new("RGB", picture.size, (108, 70, 44))
    picture.paste(rust, mask=blot.filter(ImageFilter.GaussianBlur(2)))


def _chip(random: Generator, picture: Image.Image, centre: NDArray[np.float64], radii: tuple[float, float]) -> None:
    angle, radius = random.uniform(0, 2 * np.pi), radii[0] if random.random() < 0.6 else radii[1]
    spot = centre + radius * np.array([np.cos(angle), np.sin(angle)])
    corners = [tuple(spot + random.uniform(8, 15) * np.array([np.cos(a), np.sin(a)])) for a in np.linspace(0, 5.6, 8)]
    ImageDraw.Draw(picture).polygon(corners, fill=(58, 63, 68))


DEFECTS = {"scratch": _scratch, "stain": _stain, "chip": _chip}
