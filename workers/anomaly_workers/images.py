"""Image files to pictures, and anomaly maps back to files for human eyes. No torch here."""

from __future__ import annotations

import io
import math
import re
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from anomaly_workers.errors import ImageError
from anomaly_workers.types import Picture

GRID = 16
"""Sides of a picture are multiples of this, the coarsest stride in use with most networks."""

MAX_RATIO = 16.0
"""Slimmer images than 16:1 are squeezed to this, so that the short side keeps some pixels."""

ALPHA_GROUND = (128, 128, 128)
"""Transparent images are laid on mid grey: near the mean a network was trained on, the least edge round the object."""

BIT_DEPTHS = (8, 12, 16, 24, 32)
"""Depths that cameras deliver inside wider integer files; the smallest that holds an image's maximum is its range."""

MAX_HEATMAP_SIDE = 1024
"""Longest side of a heatmap in pixels."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DECODER_ERRORS = (
    OSError, ValueError, SyntaxError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError,
    EOFError, MemoryError, struct.error, zlib.error, Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow's decoders raise on damaged files; they have no common base class."""

_QUIET = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_pillow_globals = threading.Lock()

_COLOURS = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
"""Support points of the perceptually uniform map "inferno" (CC0), dark to bright."""


def load(source: bytes | Path, *, side: int, max_megapixels: int = 100) -> Picture:
    """Decode an image file and scale it to an area of about `side` x `side` pixels.

    Area, not width, is fixed: the aspect ratio stays and every image costs the same. Both sides are multiples of 16.

    Args:
        source: the file's content, or its path.
        side: square root of the wanted pixel count.
        max_megapixels: larger images are refused from their header, before anything is decoded.

    Raises:
        ImageError: not an image, damaged, or too large; the message says so in one line.
    """
    with _open(source) as image:
        _check_size(image.size, max_megapixels)
        try:
            small, size = _decode(image, side)
        except _DECODER_ERRORS as error:
            raise ImageError(f"The image is damaged: {_one_line(error)}. Export or upload it again.") from error
    return Picture(pixels=np.asarray(small), size=size)


def grid_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the (height, width) in pixels that an original of `size` (height, width) is scaled to."""
    ratio = min(max(size[1] / size[0], 1 / MAX_RATIO), MAX_RATIO)  # width / height
    height = max(GRID, round(side / math.sqrt(ratio) / GRID) * GRID)
    width = max(GRID, round(side * math.sqrt(ratio) / GRID) * GRID)
    return height, width


def heatmap(picture: Picture, anomaly_map: NDArray[np.float32], threshold: float) -> bytes:
    """Draw an anomaly map over its image, as a PNG file with the original's aspect ratio.

    The image lies beneath in grey. Colour and opacity follow the map on the fixed scale 0 to 1, never stretched, so
    that two heatmaps can be compared; a white line with a dark rim surrounds what reaches the threshold.

    Args:
        picture: the image as the detector saw it.
        anomaly_map: (h, w) in [0, 1].
        threshold: the operating point in [0, 1].
    """
    height, width = _display_size(picture.size)
    grey = Image.fromarray(picture.pixels).convert("L").resize((width, height), Image.Resampling.BICUBIC)
    values = np.clip(resized(anomaly_map, (height, width)), 0.0, 1.0)
    ground = np.asarray(grey, np.float32)[..., None]  # (h, w, 1)
    opacity = (0.8 * np.clip((values - 0.15) / 0.5, 0.0, 1.0))[..., None]
    drawn = ground * (1 - opacity) + _coloured(values) * opacity  # (h, w, 3)
    above = values >= threshold
    line = _grown(above)
    drawn[_grown(line) & ~line] = 0
    drawn[line & ~above] = 255
    return _png(Image.fromarray(drawn.clip(0, 255).astype(np.uint8)))


def mask_png(mask: NDArray[np.bool_], size: tuple[int, int]) -> bytes:
    """Return a black and white PNG of `mask` (h, w), enlarged to `size`, the original's (height, width) in pixels."""
    values = Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))
    smooth = values.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return _png(smooth.point([0] * 128 + [255] * 128))


def resized(values: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """Interpolate a map (h, w) bilinearly to `size` (height, width)."""
    if values.shape == size:
        return values
    image = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _open(source: bytes | Path) -> Image.Image:
    """Read the header. The size limit is ours, so Pillow's global one is set aside for that moment."""
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with _pillow_globals:
        if _QUIET not in warnings.filters:  # remarks about odd metadata must not fail or flood anything
            warnings.filterwarnings("ignore", module=r"PIL\.")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ImageError(f"{source!s} is not a file. Check the path.") from error
        except _DECODER_ERRORS as error:
            raise ImageError(f"Not a readable image: {_first_bytes(source)}. Convert it to PNG or JPEG.") from error
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _first_bytes(source: bytes | Path) -> str:
    """Describe a file that is no image."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        return _one_line(error)
    return f"it starts with {head!r}" if head else "it is empty"


def _check_size(size: tuple[int, int], max_megapixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"The image is empty ({width} x {height} pixels). Export it again.")
    if width * height > max_megapixels * 1_000_000:
        raise ImageError(
            f"The image has {width * height / 1e6:.0f} megapixels ({width} x {height}), more than the "
            f"{max_megapixels} allowed. Shrink it, or raise ANOMALY_MAX_MEGAPIXELS."
        )


def _decode(image: Image.Image, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """Return the upright RGB image at its working size, and the upright original's (height, width)."""
    wide, high = image.size
    working = grid_size((high, wide), side)
    image.draft(None, (working[1], working[0]))  # JPEG only: decodes at 1/2, 1/4 or 1/8, never below the wanted size
    drafted = image.size != (wide, high)
    image.load()
    if not drafted:
        wide, high = image.size  # TIFF turns itself upright while loading
        working = grid_size((high, wide), side)
    rgb = _rgb(image).resize((working[1], working[0]), Image.Resampling.BICUBIC, reducing_gap=2.0)
    orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation not in _UPRIGHT:
        return rgb, (high, wide)
    size = (wide, high) if orientation >= 5 else (high, wide)
    return rgb.transpose(_UPRIGHT[orientation]), size


def _rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to 8-bit RGB without clipping: ranges are scaled, transparency is laid on grey."""
    if image.mode == "F":
        image = Image.fromarray(_float_to_bytes(np.asarray(image, np.float32)))
    elif image.mode.startswith("I"):
        image = Image.fromarray(_integer_to_bytes(np.asarray(image).astype(np.int64)))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        ground = Image.new("RGBA", image.size, (*ALPHA_GROUND, 255))
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _integer_to_bytes(values: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Scale by the camera's likely bit depth, not by the image's own extremes: brightness stays comparable."""
    values = values - min(0, int(values.min()))
    depth = next((bits for bits in BIT_DEPTHS if int(values.max()) < 2**bits), 64)
    return (values / (2.0**depth - 1) * 255.0 + 0.5).astype(np.uint8)


def _float_to_bytes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Read [0, 1] and [0, 255] as what they are; any other range is stretched to its extremes."""
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if low >= 0.0 and high <= 255.0:
        return (values * (255.0 if high <= 1.0 else 1.0) + 0.5).astype(np.uint8)
    return ((values - low) / (high - low) * 255.0 + 0.5).astype(np.uint8)


def _display_size(size: tuple[int, int]) -> tuple[int, int]:
    """Shrink (height, width) to a heatmap's largest side; tiny images are enlarged so that a person sees something."""
    scale = min(1.0, MAX_HEATMAP_SIDE / max(size))
    scale = max(scale, min(256 / max(size), 256.0))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _coloured(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Map (h, w) in [0, 1] to colours (h, w, 3) in [0, 255]."""
    stops = np.linspace(0.0, 1.0, len(_COLOURS))
    table = np.array(_COLOURS, np.float32)
    return np.stack([np.interp(values, stops, table[:, c]) for c in range(3)], axis=-1).astype(np.float32)


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Dilate by one pixel in the four directions."""
    padded = np.pad(mask, 1)
    grown = padded[1:-1, 1:-1] | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return np.asarray(grown, np.bool_)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:160].rstrip(".")
