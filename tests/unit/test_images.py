"""Every kind of image file an inspector has, and every kind of broken one."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomaly_workers import images
from anomaly_workers.errors import ImageError
from anomaly_workers.types import Picture


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 64, height: int = 48) -> Image.Image:
    x = np.linspace(0, 255, width)[None].repeat(height, 0)
    return Image.fromarray(np.stack([x, x[:, ::-1], np.full_like(x, 90)], -1).astype(np.uint8))


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def mean(picture: Picture) -> list[float]:
    return [round(float(value)) for value in picture.pixels.mean((0, 1))]


@pytest.mark.parametrize(
    ("width", "height"), [(512, 208), (208, 512), (300, 300), (1, 1), (1, 400), (5000, 3), (4000, 3000)]
)
def test_area_is_bounded_and_aspect_ratio_kept(width: int, height: int) -> None:
    picture = images.load(encoded(Image.new("RGB", (width, height), "red")), side=128)

    h, w, channels = picture.pixels.shape
    assert picture.size == (height, width)
    assert (h % 16, w % 16, channels) == (0, 0, 3)
    assert h * w <= 1.6 * 128**2
    if max(width, height) / min(width, height) < 4:
        assert w / h == pytest.approx(width / height, rel=0.15)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF"])
def test_formats_look_alike(kind: str) -> None:
    picture = images.load(encoded(gradient(), kind), side=64)

    assert mean(picture) == pytest.approx([128, 128, 90], abs=4)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"])
def test_modes_become_rgb(mode: str) -> None:
    grey = Image.new("L", (20, 20), 255)
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 20), 65535, np.uint16))
    else:
        image = grey.convert("RGB").convert(mode) if mode in {"LAB", "HSV", "YCbCr", "CMYK"} else grey.convert(mode)
    kind = "TIFF" if mode in {"CMYK", "LAB", "YCbCr", "F", "I", "I;16"} else "PNG"
    content = encoded(image.convert("RGB") if mode == "HSV" else image, kind)

    assert mean(images.load(content, side=32)) == pytest.approx([255, 255, 255], abs=2)


@pytest.mark.parametrize(("top", "expected"), [(200, 100), (4095, 127), (65535, 128)])
def test_integer_range_is_scaled_by_bit_depth_not_clipped(top: int, expected: int) -> None:
    values = np.zeros((32, 32), np.uint16)
    values[:, 16:] = top

    picture = images.load(encoded(Image.fromarray(values)), side=32)

    assert mean(picture)[0] == pytest.approx(expected, abs=2)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 255.0), (-3.0, 7000.0)])
def test_float_range_is_recognised(low: float, high: float) -> None:
    values = np.full((32, 32), low, np.float32)
    values[:, 16:] = high
    values[0, 0] = np.nan if low == 0 else low

    picture = images.load(encoded(Image.fromarray(values), "TIFF"), side=32)

    assert mean(picture)[0] == pytest.approx(127, abs=2)


def test_transparency_lies_on_grey() -> None:
    clear = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([255, 0, 0] * 256)

    for content in (encoded(clear), encoded(clear.convert("LA")), encoded(palette, transparency=0)):
        assert mean(images.load(content, side=32)) == [128, 128, 128]


@pytest.mark.parametrize("kind", ["JPEG", "TIFF", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    upright = Image.new("RGB", (96, 64))
    upright.paste((255, 255, 255), (0, 0, 48, 32))  # bright at the top left
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transposition that stores it so
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation

    picture = images.load(encoded(stored, kind, exif=exif), side=64)

    assert picture.size == (64, 96)
    h, w = picture.pixels.shape[:2]
    assert picture.pixels[: h // 3, : w // 3].mean() > 230
    assert picture.pixels[h * 2 // 3 :].mean() < 20


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]

    picture = images.load(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), side=32)

    assert mean(picture) == pytest.approx([255, 0, 0], abs=2)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF"])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_truncated_files_have_a_reason(kind: str, share: float) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), np.uint8))
    content = encoded(noise, kind)

    with pytest.raises(ImageError, match=r"^[^\n]+\.$"):
        images.load(content[: int(len(content) * share)], side=32)


@pytest.mark.parametrize("content", [b"", b"hello, I am a text file", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM"])
def test_what_is_no_image_is_refused(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(content)

    for source in (content, file):
        with pytest.raises(ImageError, match=r"Not a readable image|damaged"):
            images.load(source, side=32)


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="not a file"):
        images.load(tmp_path / "none.png", side=32)


@pytest.mark.parametrize("pixels", [(20_000, 20_000), (12_000, 10_000), (60_000, 60_000)])
def test_bombs_are_refused_from_the_header(pixels: tuple[int, int]) -> None:
    limit = Image.MAX_IMAGE_PIXELS

    with pytest.raises(ImageError, match="megapixels"):
        images.load(bomb(*pixels), side=32, max_megapixels=100)

    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_limit_can_be_raised_above_pillows_own() -> None:
    with pytest.raises(ImageError, match="damaged"):
        images.load(bomb(20_000, 20_000), side=32, max_megapixels=500)


def test_heatmap_has_a_fixed_scale_and_marks_the_threshold() -> None:
    picture = Picture(np.full((64, 96, 3), 100, np.uint8), size=(640, 960))
    quiet = np.full((64, 96), 0.1, np.float32)
    loud = quiet.copy()
    loud[20:40, 30:60] = 0.9

    calm = np.asarray(Image.open(io.BytesIO(images.heatmap(picture, quiet, 0.5))))
    alarm = np.asarray(Image.open(io.BytesIO(images.heatmap(picture, loud, 0.5))))

    assert calm.shape == alarm.shape == (640, 960, 3)
    assert (calm == 100).all()
    assert alarm[300, 450, 0] > 180 > alarm[300, 450, 2]
    assert (alarm == 255).all(axis=2).any()


def test_heatmap_of_a_huge_or_a_tiny_image_is_of_viewing_size() -> None:
    for size in ((8000, 4000), (1, 1), (1, 5000)):
        drawn = images.heatmap(Picture(np.zeros((32, 16, 3), np.uint8), size), np.zeros((32, 16), np.float32), 0.5)
        assert 256 <= max(Image.open(io.BytesIO(drawn)).size) <= 1024


def test_mask_png_has_the_originals_size() -> None:
    mask = np.zeros((8, 12), np.bool_)
    mask[2:6, 3:9] = True

    drawn = Image.open(io.BytesIO(images.mask_png(mask, (80, 120))))

    assert drawn.size == (120, 80)
    assert set(np.unique(np.asarray(drawn))) == {0, 255}
    assert np.asarray(drawn)[40, 60] == 255
    assert (np.asarray(drawn) == 255).mean() == pytest.approx(0.25, abs=0.03)
