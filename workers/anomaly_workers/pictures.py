"""Decoded uploads kept on disk, so that a new version need not ask Label Studio for them again."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from anomaly_workers.store import image_key
from anomaly_workers.types import Picture

UPLOADS = "/data/upload/"
"""Only what was uploaded is kept: its address has a random part and never gets another content."""

CHECK_EVERY = 256
"""Pictures written between two looks at the folder's size."""


class PictureCache:
    """A bounded folder of pictures; whatever is wrong with a file, the picture is fetched again.

    Attributes:
        folder: where they are.
        limit: bytes; the pictures not used for the longest time go first. 0 keeps nothing.
    """

    def __init__(self, folder: Path, *, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self._written = 0

    def get(self, value: str, *, side: int) -> Picture | None:
        """Return the picture of an image address, None if it is not kept."""
        path = self._path(value, side)
        if path is None or not path.exists():
            return None
        with contextlib.suppress(OSError, ValueError, KeyError, SyntaxError), Image.open(path) as image:
            height, width = (int(number) for number in str(image.text["size"]).split("x"))  # type: ignore[attr-defined]
            picture = Picture(np.asarray(image.convert("RGB")), size=(height, width))
            os.utime(path)
            return picture
        return None

    def put(self, value: str, picture: Picture, *, side: int) -> None:
        """Keep a picture if it may be kept; a full disk is no error."""
        path = self._path(value, side)
        if path is None or not self.limit:
            return
        about = PngImagePlugin.PngInfo()
        about.add_text("size", f"{picture.size[0]}x{picture.size[1]}")
        scratch = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.pixels).save(scratch, "PNG", compress_level=1, pnginfo=about)
            os.replace(scratch, path)
        self._written += 1
        if self._written % CHECK_EVERY == 0:
            self._trim()

    def _trim(self) -> None:
        files = [(path.stat().st_mtime, path.stat().st_size, path) for path in self.folder.glob("*/*.png")]
        excess = sum(size for _, size, _ in files) - self.limit
        for _, size, path in sorted(files):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size

    def _path(self, value: str, side: int) -> Path | None:
        if not value.startswith(UPLOADS):
            return None
        key = image_key(value)
        return self.folder / key[:2] / f"{key}-{side}.png"
