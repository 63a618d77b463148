"""Mask formats: Label Studio's run-length code, PNG, outlines; all bounded for 100-megapixel images."""

from __future__ import annotations

import base64
import binascii
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, PngImagePlugin

from anomaly_workers.errors import ConfigError

BAND_PIXELS = 4_000_000  # rows are worked on in bands of about this many pixels
FAR = 10.0  # image sides away from the image that a drawn point can be
MAX_PIXELS = 400_000_000  # larger masks are refused: more than any image that is scored
_CHANNELS = 4  # Label Studio's run-length code is over RGBA values
_RLE_SIZES = (3, 4, 8, 16)  # bits of the four length classes, as Label Studio's own encoder writes them
_LONGEST = 2**16


def bands(mask: NDArray[np.bool_], size: tuple[int, int]) -> Iterator[NDArray[np.bool_]]:
    """Yield a mask scaled to `size` (height, width), smoothly, as bands of full rows from the top.

    No mark vanishes: a smaller size is covered cell by cell, and smoothing starts at twice the map's own size.
    """
    height, width = size
    if mask.shape[0] > height or mask.shape[1] > width:
        smaller = (min(height, mask.shape[0]), min(width, mask.shape[1]))
        mask = reduced(np.where(mask, np.uint8(255), np.uint8(0)), smaller)
    rows = max(1, BAND_PIXELS // max(width, 1))
    top, bottom = _span(np.any(mask, axis=1), height)
    wide = _stretched(mask.astype(np.float32).T, width).T  # (h, width): the map's rows at full width
    low, high, weight = _taps(mask.shape[0], height)
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        band = np.zeros((stop - start, width), dtype=bool)
        inner = slice(max(start, top), min(stop, bottom))
        if inner.start < inner.stop:
            part = weight[inner, None]
            mixed = wide[low[inner]] * (1 - part) + wide[high[inner]] * part
            band[inner.start - start : inner.stop - start] = mixed > 0.5
        yield band


def enlarged(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return a mask scaled to `size` (height, width) in one piece."""
    return np.concatenate(list(bands(mask, size)))


def to_rle(mask: NDArray[np.bool_], size: tuple[int, int]) -> list[int]:
    """Return a mask, scaled to `size`, in the run-length code of BrushLabels."""
    lengths, values = _runs(mask, size)
    lengths = lengths * _CHANNELS
    full = (lengths - 1) // _LONGEST  # runs longer than one code can say are split
    codes = np.repeat(np.arange(len(lengths)), full + 1)
    last = np.cumsum(full + 1) - 1
    run = np.full(len(codes), _LONGEST, dtype=np.int64)
    run[last] = lengths - full * _LONGEST
    header = struct.pack(">I", size[0] * size[1] * _CHANNELS)
    bits = np.concatenate([np.unpackbits(np.frombuffer(header, np.uint8)), _parameters(), _coded(run, values[codes])])
    filler = np.zeros(8 - len(bits) % 8, dtype=np.uint8)
    packed: list[int] = np.packbits(np.concatenate([bits, filler])).tolist()
    return packed


def from_rle(code: list[int], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return the alpha channel of a BrushLabels run-length code as (height, width).

    Raises:
        ConfigError: the code is damaged or belongs to an image of another size.
    """
    height, width = size
    try:
        data = bytes(code)
    except (TypeError, ValueError) as error:
        raise ConfigError("A brush mask is not a list of bytes.") from error
    if len(data) < 8 or struct.unpack_from(">I", data)[0] != height * width * _CHANNELS:
        raise ConfigError(f"A brush mask does not belong to an image of {width} x {height} pixels.")
    return _alpha(data, height * width).reshape(height, width)


def to_png(mask: NDArray[np.bool_], size: tuple[int, int]) -> str:
    """Return a mask, scaled to `size`, as the data URL of a PNG: black where True, else transparent."""
    height, width = size
    packer = zlib.compressobj(6)
    body = bytearray()
    for band in bands(mask, size):
        rows = np.packbits(band, axis=1)  # (rows, bytes): one bit a pixel
        body += packer.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes())  # a leading 0 says: row not filtered
    body += packer.flush()
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        _chunk(kind, content)
        for kind, content in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 3, 0, 0, 0)),
            (b"PLTE", b"\x00" * 6),
            (b"tRNS", b"\x00\xff"),
            (b"IDAT", bytes(body)),
            (b"IEND", b""),
        )
    )
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def from_png(url: str) -> NDArray[np.uint8]:
    """Return the alpha channel of a PNG data URL as (height, width).

    Raises:
        ConfigError: not a PNG data URL, damaged, or larger than any image.
    """
    _head, comma, text = url.partition(",")
    if not comma or not url.startswith("data:image/png"):
        raise ConfigError("A bitmask is not a PNG data URL.")
    try:
        # PngImageFile itself, because Image.open warns about sizes that are allowed here.
        with PngImagePlugin.PngImageFile(io.BytesIO(base64.b64decode(text, validate=True))) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ConfigError(f"A bitmask of {image.width} x {image.height} pixels is too large.")
            if image.mode not in ("LA", "RGBA"):
                return np.asarray(image.convert("RGBA").getchannel("A"))
            return np.asarray(image.getchannel("A"))
    except (binascii.Error, OSError, SyntaxError, ValueError) as error:
        raise ConfigError("A bitmask is a damaged PNG.") from error


def outline(mask: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """Return the outer contour of a mask's largest component as (x, y) in [0, 1]; empty for an empty mask."""
    import cv2  # 0.1 s; only PolygonLabels need it

    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    if len(rows) == 0:
        return []
    scale = max(1, min(4, 1024 // max(mask.shape)))
    height, width = mask.shape
    fine = enlarged(mask, (height * scale, width * scale)).astype(np.uint8)
    contours, _tree = cv2.findContours(fine, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    contour = max(contours, key=cv2.contourArea)
    points = cv2.approxPolyDP(contour, 0.35 * scale, closed=True).reshape(-1, 2)
    if len(points) < 3:
        return _corners(rows, columns, mask.shape)
    edges = _outward(points.astype(np.float64), fine.shape)
    return [(float(x), float(y)) for x, y in edges]


def box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Return (left, top, right, bottom) of a mask's bounding box in [0, 1]; all zero for an empty mask."""
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    if len(rows) == 0:
        return 0.0, 0.0, 0.0, 0.0
    (left, top), _right_top, (right, bottom), _left_bottom = _corners(rows, columns, mask.shape)
    return left, top, right, bottom


def filled(points: list[tuple[float, float]], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the polygon through (x, y) points in [0, 1] as a mask of `size`; thin ones stay visible.

    Raises:
        ConfigError: a point is not a number, or far outside the image.
    """
    height, width = size
    if not all(abs(x) < FAR and abs(y) < FAR for x, y in points):  # false for NaN
        raise ConfigError("A region's points are not inside its image.")
    scale = max(1, min(4, 4096 // max(size)))
    canvas = Image.new("L", (width * scale, height * scale))
    corners = [(x * width * scale - 0.5, y * height * scale - 0.5) for x, y in points]
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    return reduced(np.asarray(canvas), size)


def reduced(alpha: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Return where alpha is above 127, at `size`; a mark smaller than a pixel of `size` does not vanish."""
    height, width = size
    solid = np.where(alpha > 127, np.uint8(255), np.uint8(0))
    if solid.shape == size:
        return solid > 127
    cover = np.asarray(Image.fromarray(solid).resize((width, height), Image.Resampling.BOX))
    if cover.max() > 127 or not solid.any():
        return cover > 127
    if cover.max() > 0:
        return cover >= max(1, int(cover.max()) // 2)
    rows, columns = np.nonzero(solid)  # so small that its share rounds to nothing
    kept = np.zeros(size, dtype=bool)
    kept[rows * height // alpha.shape[0], columns * width // alpha.shape[1]] = True
    return kept


def _runs(mask: NDArray[np.bool_], size: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Lengths and values (0 or 255) of the runs of a scaled mask, row by row."""
    starts: list[NDArray[np.int64]] = []
    offset, previous, first = 0, False, False
    for band in bands(mask, size):
        flat = band.ravel()
        if offset == 0:
            first = previous = bool(flat[0])
        if flat[0] != previous:
            starts.append(np.array([offset], dtype=np.int64))
        starts.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1 + offset)
        offset, previous = offset + len(flat), bool(flat[-1])
    edges = np.concatenate([np.zeros(1, np.int64), *starts, np.full(1, offset, np.int64)])
    lengths = np.diff(edges)
    solid = (np.arange(len(lengths)) % 2 == 0) == first
    return lengths, np.where(solid, np.uint8(255), np.uint8(0))


def _coded(lengths: NDArray[np.int64], values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Bits of the codes `1, class, length - 1, value`, one a run of at least two values."""
    kind = np.searchsorted(2 ** np.array(_RLE_SIZES), lengths)
    size_bits = np.array(_RLE_SIZES)[kind]
    word = (((4 | kind) << size_bits | (lengths - 1)) << 8) | values
    total = 3 + size_bits + 8
    ends = np.cumsum(total)
    bits = np.zeros(int(ends[-1]), dtype=np.uint8)
    for place in range(3 + max(_RLE_SIZES) + 8):
        there = total > place
        bits[ends[there] - 1 - place] = (word[there] >> place) & 1
    return bits


def _parameters() -> NDArray[np.uint8]:
    """Bits of the word size (8) and the four length classes."""
    text = f"{7:05b}" + "".join(f"{size - 1:04b}" for size in _RLE_SIZES)
    return np.array([int(bit) for bit in text], dtype=np.uint8)


class _Bits:
    """Big-endian bits of some bytes, read from the front."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._end = len(data) * 8
        self.at = 0

    def read(self, count: int) -> int:
        at, self.at = self.at, self.at + count
        if self.at > self._end:
            raise ConfigError("A brush mask ends too early.")
        stop = (self.at + 7) // 8
        word = int.from_bytes(self._data[at // 8 : stop], "big")
        return (word >> (stop * 8 - self.at)) & ((1 << count) - 1)

    def take(self, count: int, bits: int) -> NDArray[np.int64]:
        """Read `count` numbers of `bits` bits at once."""
        at, self.at = self.at, self.at + count * bits
        if self.at > self._end:
            raise ConfigError("A brush mask ends too early.")
        window = np.frombuffer(self._data[at // 8 : (self.at + 7) // 8], np.uint8)
        flat = np.unpackbits(window)[at % 8 : at % 8 + count * bits].reshape(count, bits)
        return flat @ (1 << np.arange(bits - 1, -1, -1))


def _alpha(data: bytes, pixels: int) -> NDArray[np.uint8]:
    bits = _Bits(data)
    total, word = bits.read(32), bits.read(5) + 1
    sizes = [bits.read(4) + 1 for _ in range(4)]
    if word > 8 or pixels > MAX_PIXELS:
        raise ConfigError("A brush mask has an unknown form.")
    alpha = np.zeros(pixels, dtype=np.uint8)
    at = 0
    while at < total:
        repeated = bits.read(1)
        stop = at + 1 + bits.read(sizes[bits.read(2)])
        if repeated:
            alpha[at // _CHANNELS : stop // _CHANNELS] = bits.read(word)  # alpha is every fourth value
        else:
            values = bits.take(stop - at, word)
            alpha[at // _CHANNELS : stop // _CHANNELS] = values[(3 - at) % _CHANNELS :: _CHANNELS]
        at = stop
    return alpha


def _span(marked: NDArray[np.bool_], full: int) -> tuple[int, int]:
    """First and one past the last place of a scaled axis that a marked place can reach."""
    places = np.nonzero(marked)[0]
    if len(places) == 0:
        return 0, 0
    step = full / len(marked)
    return max(0, int((places[0] - 1) * step)), min(full, int((places[-1] + 2) * step) + 1)


def _taps(small: int, large: int) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float32]]:
    """The two neighbours of each place of a scaled axis, and the weight of the second."""
    centre = (np.arange(large) + 0.5) * small / large - 0.5
    low = np.clip(np.floor(centre).astype(np.intp), 0, small - 1)
    high = np.minimum(low + 1, small - 1)
    weight = np.clip(centre - low, 0, 1)
    return low, high, (weight if large >= 2 * small else np.rint(weight)).astype(np.float32)


def _stretched(rows: NDArray[np.float32], full: int) -> NDArray[np.float32]:
    low, high, weight = _taps(rows.shape[0], full)
    mixed: NDArray[np.float32] = rows[low] * (1 - weight[:, None]) + rows[high] * weight[:, None]
    return mixed


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _corners(rows: NDArray[np.intp], columns: NDArray[np.intp], shape: tuple[int, ...]) -> list[tuple[float, float]]:
    left, right = columns[0] / shape[1], (columns[-1] + 1) / shape[1]
    top, bottom = rows[0] / shape[0], (rows[-1] + 1) / shape[0]
    return [(float(x), float(y)) for x, y in ((left, top), (right, top), (right, bottom), (left, bottom))]


def _outward(points: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Move a contour from pixel centres to pixel edges: half a pixel away from its middle, into [0, 1]."""
    middle = points.mean(axis=0)
    moved = points + 0.5 + np.sign(points - middle) * 0.5
    scaled: NDArray[np.float64] = np.clip(moved / np.array([shape[1], shape[0]]), 0, 1)
    return scaled
