"""Predictions as Label Studio wants them, and masks as its own code writes them."""

from __future__ import annotations

import base64
import importlib.util
import io
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from anomaly_workers.errors import ConfigError
from anomaly_workers.labelstudio import config, encode, masks
from anomaly_workers.types import Control, Controls, Detection, Region

CONTROLS = Controls(
    image="image",
    value="image",
    choices=Control("Choices", "cls", "image", ("normal", "anomaly")),
    normal="normal",
    anomaly="anomaly",
    mask=Control("BrushLabels", "brush", "image", ("Defect",)),
    mask_label="Defect",
    number=Control("Number", "score", "image"),
)


def detection(score: float, threshold: float = 0.5, size: tuple[int, int] = (60, 80)) -> Detection:
    return Detection(score, threshold, np.zeros((6, 8), np.float32), size)


def label_studios_own() -> Any:
    """The SDK's encoder alone: importing it the usual way loads pandas and more, for many seconds."""
    package = importlib.util.find_spec("label_studio_sdk")
    assert package is not None
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location("brush", Path(package.origin).parent / "converter/brush.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blob() -> NDArray[np.bool_]:
    mask = np.zeros((6, 8), dtype=bool)
    mask[2:4, 3:6] = True
    return mask


def noise(shape: tuple[int, int], share: float) -> NDArray[np.bool_]:
    return np.random.default_rng(5).random(shape) < share


@pytest.mark.parametrize(
    ("score", "threshold", "expected"),
    [(0.5, 0.5, 0), (1, 0.5, 1), (0, 0.5, 1), (0.75, 0.5, 0.5), (0.1, 0.2, 0.5), (0.2, 0.2, 0), (1, 1, 0), (0, 0, 0)],
)
def test_confidence_is_the_distance_to_the_threshold(score: float, threshold: float, expected: float) -> None:
    assert encode.confidence(detection(score, threshold)) == pytest.approx(expected)


def test_a_prediction_has_verdict_number_and_one_region_each() -> None:
    found = encode.prediction(7, detection(0.9), [Region(blob(), 0.8), Region(blob(), 0.7)], CONTROLS, "v1")
    assert (found["task"], found["model_version"], found["score"]) == (7, "v1", 0.8)
    assert [part["type"] for part in found["result"]] == ["choices", "number", "brushlabels", "brushlabels"]
    assert found["result"][0]["value"] == {"choices": ["anomaly"]}
    assert found["result"][1]["value"] == {"number": 0.9}
    assert [part["score"] for part in found["result"][2:]] == [0.8, 0.7]
    assert (found["result"][2]["original_width"], found["result"][2]["original_height"]) == (80, 60)


def test_region_ids_are_stable_and_different() -> None:
    first, again = (
        encode.prediction(7, detection(0.9), [Region(blob(), 0.8)] * 3, CONTROLS, "v1")["result"] for _ in range(2)
    )
    assert first == again
    assert len({part["id"] for part in first}) == 5


def test_only_the_controls_there_are_get_filled() -> None:
    controls = Controls("image", "image", number=CONTROLS.number)
    found = encode.prediction(7, detection(0.2), [Region(blob(), 0.8)], controls, "v1")
    assert [part["type"] for part in found["result"]] == ["number"]


def test_an_empty_region_is_left_out() -> None:
    found = encode.prediction(7, detection(0.2), [Region(np.zeros((6, 8), bool), 0.8)], CONTROLS, "v1")
    assert [part["type"] for part in found["result"]] == ["choices", "number"]


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((5, 7), bool),
        np.ones((5, 7), bool),
        noise((64, 50), 0.5),
        noise((200, 300), 0.01),
        np.ones((300, 301), bool),
        np.eye(33, dtype=bool),
    ],
    ids=["empty", "full", "noise", "speckle", "long runs", "diagonal"],
)
def test_the_run_length_code_equals_label_studios_own(mask: NDArray[np.bool_]) -> None:
    brush = label_studios_own()
    size = (mask.shape[0], mask.shape[1])
    code = masks.to_rle(mask, size)
    alpha = np.where(mask, 255, 0).astype(np.uint8)
    assert code == brush.mask2rle(alpha)
    decoded = brush.decode_rle(code).reshape(*mask.shape, 4)[:, :, 3]
    assert (decoded == alpha).all()
    assert (masks.from_rle(code, size) == alpha).all()


def test_single_values_of_the_browsers_code_are_read() -> None:
    brush = label_studios_own()
    alpha = np.random.default_rng(1).integers(0, 256, 20 * 30 * 4).astype(np.uint8)
    code = brush.encode_rle(alpha)
    assert (masks.from_rle(code, (20, 30)) == alpha.reshape(20, 30, 4)[:, :, 3]).all()


def test_literal_stretches_of_the_browsers_code_are_read() -> None:
    values = np.arange(24, dtype=np.uint8)
    bits = f"{24:032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    bits += "0" + "10" + f"{23:08b}" + "".join(f"{value:08b}" for value in values)
    code = np.packbits([int(bit) for bit in bits.ljust(-(-len(bits) // 8) * 8, "0")]).tolist()
    assert masks.from_rle(code, (2, 3)).tolist() == [[3, 7, 11], [15, 19, 23]]


@pytest.mark.parametrize("code", [[], [1, 2], [0] * 20, [300] * 20, "text", None, [0, 0, 0, 140, 57]])
def test_a_damaged_run_length_code_is_refused(code: object) -> None:
    with pytest.raises(ConfigError):
        masks.from_rle(code, (5, 7))  # type: ignore[arg-type]


def test_a_bitmask_is_black_on_transparent() -> None:
    url = masks.to_png(blob(), (60, 80))
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as image:
        assert image.size == (80, 60)
        pixels = np.asarray(image.convert("RGBA"))
    assert (pixels[:, :, :3] == 0).all()
    assert ((pixels[:, :, 3] > 127) == masks.enlarged(blob(), (60, 80))).all()


def test_an_enlarged_mask_keeps_its_place_and_area() -> None:
    large = masks.enlarged(blob(), (600, 800))
    rows, columns = np.nonzero(large)
    assert (rows.mean() / 600, columns.mean() / 800) == pytest.approx((3 / 6, 4.5 / 8), abs=0.01)
    assert large.mean() == pytest.approx(blob().mean(), rel=0.15)


@pytest.mark.parametrize(
    "size", [(6, 8), (7, 9), (8, 11), (11, 15), (12, 16), (13, 50), (3, 5), (1, 1), (2, 40), (60, 4)]
)
def test_no_single_pixel_vanishes_at_any_size(size: tuple[int, int]) -> None:
    for row, column in np.ndindex(6, 8):
        mask = np.zeros((6, 8), dtype=bool)
        mask[row, column] = True
        assert masks.enlarged(mask, size).any()


def test_bands_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = noise((20, 30), 0.3)
    whole = masks.enlarged(mask, (200, 300))
    code = masks.to_rle(mask, (200, 300))
    monkeypatch.setattr(masks, "BAND_PIXELS", 2100)
    assert (masks.enlarged(mask, (200, 300)) == whole).all()
    assert masks.to_rle(mask, (200, 300)) == code


@pytest.mark.parametrize("form", [masks.to_rle, masks.to_png])
def test_a_hundred_megapixels_stay_bounded(form: object) -> None:
    tracemalloc.start()
    began = time.monotonic()
    form(noise((64, 64), 0.3), (10_000, 10_000))  # type: ignore[operator]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400_000_000
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(("step", "expected"), [("", 0.6303), ("0.0001", 0.6303), ("0.05", 0.65), ("0.25", 0.75)])
def test_the_number_is_one_that_submit_accepts(step: str, expected: float) -> None:
    attribute = f'step="{step}"' if step else ""
    xml = f'<View><Image name="i" value="$i"/><Number name="n" toName="i" min="0" max="1" {attribute}/></View>'
    detection = Detection(0.6303, 0.5, np.zeros((4, 4), np.float32), (4, 4))
    (number,) = encode.prediction(1, detection, [], config.parse(xml), "v")["result"]
    assert number["value"] == {"number": expected}
