"""Decoded uploads are kept, bounded, and never trusted blindly."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from anomaly_workers import pictures
from anomaly_workers.pictures import PictureCache
from anomaly_workers.types import Picture

UPLOAD = "/data/upload/3/0a1b2c3d-part.png"


def picture(seed: int = 0) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Picture(pixels, size=(400, 500))


def test_an_upload_comes_back_as_it_was(tmp_path: Path) -> None:
    cache = PictureCache(tmp_path, limit=10**6)
    assert cache.get(UPLOAD, side=64) is None
    cache.put(UPLOAD, picture(), side=64)
    kept = cache.get(UPLOAD, side=64)
    assert kept is not None
    assert kept.size == (400, 500)
    assert np.array_equal(kept.pixels, picture().pixels)
    assert cache.get(UPLOAD, side=32) is None, "another size is another picture"


@pytest.mark.parametrize("value", ["https://example.com/a.png", "s3://bucket/a.png", "/data/local-files/?d=a.png", ""])
def test_what_may_change_behind_its_address_is_not_kept(tmp_path: Path, value: str) -> None:
    cache = PictureCache(tmp_path, limit=10**6)
    cache.put(value, picture(), side=64)
    assert cache.get(value, side=64) is None
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_fetched_again(tmp_path: Path) -> None:
    cache = PictureCache(tmp_path, limit=10**6)
    cache.put(UPLOAD, picture(), side=64)
    [file] = tmp_path.glob("*/*.png")
    for content in (file.read_bytes()[:100], b"", b"no picture"):
        file.write_bytes(content)
        assert cache.get(UPLOAD, side=64) is None


def test_the_folder_is_bounded_and_what_is_used_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "CHECK_EVERY", 5)
    cache = PictureCache(tmp_path, limit=20_000)  # three pictures of noise
    for number in range(4):
        cache.put(f"/data/upload/3/{number}.png", picture(number), side=64)
    for number, path in enumerate(sorted(tmp_path.glob("*/*.png"), key=lambda path: path.stat().st_mtime)):
        os.utime(path, (number, number))
    assert cache.get("/data/upload/3/0.png", side=64) is not None
    cache.put("/data/upload/3/4.png", picture(4), side=64)
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*.png")) <= 20_000
    assert cache.get("/data/upload/3/0.png", side=64) is not None
    assert cache.get("/data/upload/3/1.png", side=64) is None


def test_no_room_is_no_error(tmp_path: Path) -> None:
    cache = PictureCache(tmp_path / "file" / "folder", limit=10**6)
    (tmp_path / "file").write_text("not a folder")
    cache.put(UPLOAD, picture(), side=64)
    assert cache.get(UPLOAD, side=64) is None
    nothing = PictureCache(tmp_path, limit=0)
    nothing.put(UPLOAD, picture(), side=64)
    assert nothing.get(UPLOAD, side=64) is None
