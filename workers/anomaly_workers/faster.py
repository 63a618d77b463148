"""The same function of a network in less time on a CPU."""

from __future__ import annotations

import copy

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional


def faster(network: nn.Module, *, cpu: bool) -> nn.Module:
    """Fold the norms and, for a CPU, pad without copies, unless that changes what the network computes.

    A network may define a norm after a convolution and call it elsewhere; running both is the proof that it does not.
    The first saves a CPU a third of its time, the second a tenth of EfficientNet-Lite's.
    """
    probe = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    try:
        changed = fold_norms(network)
        if cpu:
            pad_without_copies(changed)
        with torch.inference_mode():
            pairs = zip(network(probe), changed(probe), strict=True)
            same = all(torch.allclose(a, b, rtol=1e-2, atol=1e-2 * float(a.abs().max())) for a, b in pairs)
    except (RuntimeError, ValueError, AssertionError):  # an input of 64 pixels does not suit every network
        return network
    return changed if same else network


def fold_norms(network: nn.Module) -> nn.Module:
    """Return a copy with each batch norm merged into the convolution defined right before it."""
    network = copy.deepcopy(network)
    for parent in list(network.modules()):
        before: tuple[str, nn.Module] | None = None
        for name, child in list(parent.named_children()):
            if before and isinstance(child, nn.BatchNorm2d) and isinstance(before[1], nn.Conv2d):
                setattr(parent, before[0], nn.utils.fuse_conv_bn_eval(before[1], child))
                setattr(parent, name, getattr(child, "act", nn.Identity()))  # timm keeps the activation in the norm
            before = (name, child)
    return network


def pad_without_copies(network: nn.Module) -> None:
    """Replace the depthwise convolutions of a network that pad as TensorFlow's "same" does."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv2dSame) and child.groups == child.in_channels:
                setattr(parent, name, _GrownSame(child))


class _GrownSame(nn.Module):
    """A convolution with TensorFlow's "same" padding that copies nothing.

    "Same" pads the end by one more than the start where the sum is odd, which torch's convolutions cannot: timm copies
    the input into a larger one. Here both ends get as much as the end needs, and the kernel a leading row or column of
    zeros. A wider kernel costs a depthwise convolution less than the copy, and others more.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        pads = [
            _same(side, kernel, stride, dilation)
            for side, kernel, stride, dilation in zip(
                x.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True
            )
        ]
        odd_y, odd_x = (end - start for start, end in pads)
        weight = functional.pad(conv.weight, (odd_x, 0, odd_y, 0)) if odd_y or odd_x else conv.weight
        ends = [end for _, end in pads]
        return functional.conv2d(x, weight, conv.bias, conv.stride, ends, conv.dilation, conv.groups)


def _same(side: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """Return how much of zeros "same" puts before and behind a side of some length."""
    total = max(0, (-(-side // stride) - 1) * stride + (kernel - 1) * dilation + 1 - side)
    return total // 2, total - total // 2
