"""Pictures to grids of patch features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from anomaly_workers.backbones import Backbone
from anomaly_workers.types import Picture, Progress, no_progress

BATCH = 8
"""Pictures of one shape that go through the network together on a CPU."""

NEIGHBOURHOOD = 3
"""Features are averaged over 3 x 3 cells, PatchCore's choice (arXiv 2106.08265, 4.4.1)."""

MAX_DIMENSIONS = 512
"""Wider features are projected at random to this; distances keep within a few percent (Johnson-Lindenstrauss)."""


def patch_grids(backbone: Backbone, pictures: Sequence[Picture], *, progress: Progress = no_progress) -> list[Tensor]:
    """Return one grid (h, w, d) of locally averaged, concatenated features for each picture, in their order.

    h and w are those of the shallowest layer; pictures of one shape share a pass through the network.
    """
    grids: list[Tensor | None] = [None] * len(pictures)
    done = 0
    for indices in _batches(pictures):
        batch = grid_batch(backbone, np.stack([pictures[i].pixels for i in indices]))
        for index, grid in zip(indices, batch, strict=True):
            grids[index] = grid
        done += len(indices)
        progress(done / len(pictures), "reading features")
    return [grid for grid in grids if grid is not None]


def grid_batch(backbone: Backbone, pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """Return the feature grids (n, h, w, d) of equally shaped images (n, H, W, 3)."""
    with torch.inference_mode():
        layers = [_averaged(layer) for layer in backbone.features(pixels)]
        shape = layers[0].shape[2:]
        same = [
            layer if layer.shape[2:] == shape else functional.interpolate(layer, size=shape, mode="bilinear")
            for layer in layers
        ]
        joined = torch.cat(same, dim=1).permute(0, 2, 3, 1)  # (n, c, h, w) -> (n, h, w, d)
        return _narrowed(_tempered(joined))


def _batches(pictures: Sequence[Picture]) -> Iterator[list[int]]:
    """Yield indices of equally shaped pictures, at most a batch of them at a time."""
    shapes: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        shapes.setdefault(picture.pixels.shape, []).append(index)
    for indices in shapes.values():
        for start in range(0, len(indices), BATCH):
            yield indices[start : start + BATCH]


def _averaged(layer: Tensor) -> Tensor:
    return functional.avg_pool2d(layer.float(), NEIGHBOURHOOD, 1, NEIGHBOURHOOD // 2, count_include_pad=False)


def _tempered(grids: Tensor) -> Tensor:
    """Take signed square roots, then scale each patch to length one.

    The roots keep a few bursting channels from ruling the Euclidean distance; the length is mostly exposure and
    contrast, which vary between normal images. Both are the usual normalisation of Fisher vectors (Perronnin et al.,
    ECCV 2010, sections 3.1 and 3.2) and of RootSIFT (Arandjelovic and Zisserman, CVPR 2012).
    """
    return functional.normalize(grids.sign() * grids.abs().sqrt(), dim=-1)


def _narrowed(grids: Tensor) -> Tensor:
    """Project (n, h, w, d) to at most MAX_DIMENSIONS; the matrix depends on d alone, so that it need not be saved."""
    width = grids.shape[-1]
    if width <= MAX_DIMENSIONS:
        return grids.contiguous()
    generator = torch.Generator().manual_seed(width)
    matrix = torch.randn(width, MAX_DIMENSIONS, generator=generator) / MAX_DIMENSIONS**0.5
    return torch.matmul(grids, matrix.to(grids.device))
