"""Small copies of heatmaps."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

SIDE = 360
QUALITY = 82


def size(path: Path) -> tuple[int, int] | None:
    """Return a heatmap's (width, height) in pixels, None if its file cannot be read."""
    try:
        with Image.open(path) as picture:
            return picture.size
    except (OSError, SyntaxError, ValueError):
        return None


def thumbnail(path: Path) -> bytes | None:
    """Return a heatmap as a small JPEG, None if its file cannot be read."""
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
            small.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
    except (OSError, SyntaxError, ValueError):
        return None
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
