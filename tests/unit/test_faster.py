"""The same function in less time."""

from __future__ import annotations

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from anomaly_workers.faster import faster, fold_norms, pad_without_copies


def test_folding_keeps_the_function() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()).eval()
    norm = network[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    norm.running_mean.uniform_(-1, 1)
    x = torch.randn(1, 3, 8, 8)

    folded = fold_norms(network)

    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert torch.allclose(folded(x), network(x), atol=1e-5)


def test_a_norm_that_is_called_elsewhere_is_not_folded() -> None:
    class Twisted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [self.conv(self.bn(x).relu())]

    network = Twisted().eval()
    assert network.bn.running_mean is not None
    network.bn.running_mean.fill_(0.7)

    assert faster(network, cpu=True) is network


@pytest.mark.parametrize("sides", [(16, 16), (15, 15), (17, 12), (1, 1), (2, 3)])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_padding_without_copies_keeps_the_function(sides: tuple[int, int], kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    conv = Conv2dSame(4, 4, kernel, stride=stride, groups=4).eval()
    x = torch.randn(2, 4, *sides)
    network = nn.Sequential(conv)

    pad_without_copies(network)

    assert network[0] is not conv
    with torch.inference_mode():
        assert torch.allclose(network(x), conv(x), atol=1e-5)


def test_a_convolution_of_all_channels_keeps_its_kernel() -> None:
    conv = Conv2dSame(4, 4, 3, stride=2)
    network = nn.Sequential(conv)

    pad_without_copies(network)

    assert network[0] is conv
