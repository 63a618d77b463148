"""Backbones from local files and random weights; nothing is downloaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from anomaly_workers import backbones
from anomaly_workers.backbones import EMBEDDED, RANDOM, create
from anomaly_workers.errors import ConfigError, WeightsError

PIXELS = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)


def normalised(mean: float, std: float) -> torch.Tensor:
    return (torch.from_numpy(PIXELS).permute(0, 3, 1, 2).float() / 255 - mean) / std


def test_embedded_weights_compute_what_timm_computes() -> None:
    network = create(EMBEDDED)
    state = torch.load(backbones._embedded_file(), weights_only=True)
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), state.values(), strict=True)), strict=True)

    layers = network.features(PIXELS)

    with torch.inference_mode():
        expected = whole.forward_intermediates(normalised(0.5, 0.5), indices=[2, 3], intermediates_only=True)
    assert [tuple(layer.shape) for layer in layers] == [(2, 40, 8, 12), (2, 112, 4, 6)]
    for layer, reference in zip(layers, expected, strict=True):
        assert torch.allclose(layer, reference, atol=1e-3)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped"])
def test_a_local_file_is_used(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = timm.create_model("resnet18").eval()
    file = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(model.state_dict(), file)
    else:
        torch.save({"state_dict": model.state_dict()} if kind == "wrapped" else model.state_dict(), file)

    network = create("resnet18", weights=file, sha256=hashlib.sha256(file.read_bytes()).hexdigest(), layers=(1,))

    x = (normalised(0, 1) - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    with torch.inference_mode():
        expected = model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x)))))
    assert torch.allclose(network.features(PIXELS)[0], expected, atol=1e-3)


def test_torchvision_takes_its_own_file(tmp_path: Path) -> None:
    from torchvision.models import resnet18

    file = tmp_path / "w.pth"
    torch.save(resnet18(weights=None).state_dict(), file)

    layers = create("torchvision:resnet18", weights=file).features(PIXELS)

    assert [tuple(layer.shape) for layer in layers] == [(2, 128, 8, 12), (2, 256, 4, 6)]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet18", [(2, 128, 8, 12), (2, 256, 4, 6)]),
        ("torchvision:wide_resnet50_2", [(2, 512, 8, 12), (2, 1024, 4, 6)]),
        ("torchvision:mobilenet_v3_small", [(2, 24, 8, 12), (2, 48, 4, 6)]),
        ("vit_tiny_patch16_224", [(2, 192, 4, 6), (2, 192, 4, 6)]),
        ("vit_small_patch14_dinov2", [(2, 384, 5, 7), (2, 384, 5, 7)]),
    ],
)
def test_networks_by_name(name: str, shapes: list[tuple[int, ...]]) -> None:
    layers = create(name, weights=RANDOM).features(PIXELS)

    assert [tuple(layer.shape) for layer in layers] == shapes
    assert all(torch.isfinite(layer).all() for layer in layers)


def test_the_network_stops_at_its_deepest_layer() -> None:
    counts = [
        sum(p.numel() for p in create(EMBEDDED, weights=RANDOM, layers=layers).network.parameters())
        for layers in ((1,), (1, 3), (4,))
    ]

    assert counts[0] < 0.1 * counts[1] < 0.1 * counts[2]


def test_weights_are_never_downloaded() -> None:
    with pytest.raises(WeightsError, match="ANOMALY_WEIGHTS"):
        create("resnet18")


def test_wrong_files_say_what_to_do(tmp_path: Path) -> None:
    text, other = tmp_path / "text.pth", tmp_path / "other.safetensors"
    text.write_text("hello")
    safetensors.torch.save_file({"a": torch.zeros(2)}, other)

    for weights, sha256, reason in (
        (tmp_path / "none.pth", "", "does not exist"),
        (text, "", "no safetensors or torch weight file"),
        (text, "0" * 64, "checksum"),
        (other, "", "do not fit"),
    ):
        with pytest.raises(WeightsError, match=reason):
            create("resnet18", weights=weights, sha256=sha256)
    with pytest.raises(WeightsError, match="do not fit"):
        create(EMBEDDED, weights=other)


def test_a_pickle_with_code_is_not_run(tmp_path: Path) -> None:
    file = tmp_path / "evil.pth"
    torch.save({"model": nn.Linear(2, 2)}, file)

    with pytest.raises(WeightsError):
        create("resnet18", weights=file)


@pytest.mark.parametrize("name", ["nonsense", "torchvision:nonsense", "torchvision:vit_b_16"])
def test_unknown_networks_are_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        create(name, weights=RANDOM)


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="layers 0 to 4"):
        create("resnet18", weights=RANDOM, layers=(9,))
