"""Coloured point clouds of 8192 points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.cloud_sampling import farthest_points, nearest_neighbours
from onellm_dist.modalities.drawing import cloud as draw_cloud
from onellm_dist.modalities.io.clouds import read_cloud

POINTS, CENTRES, NEIGHBOURS = 8192, 1024, 32
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Values of the wide intermediate held at a time."""


class _WidestOfGroup(torch.autograd.Function):
    """max over K of (groups [G, K, 6] @ weight [D, 6]^T + bias), [G, D].

    The intermediate [G, K, D] (134 MB a cloud at width 1024 in fp32) only exists chunk by chunk. For the backward one byte
    an output is kept: which of the K won.
    """

    @staticmethod
    def forward(
        ctx: Any, groups: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty((len(groups), len(weight)), dtype=weight.dtype, device=groups.device)
        winners = torch.empty(out.shape, dtype=torch.uint8, device=groups.device)
        for rows in _chunks(groups, len(weight)):
            best = torch.matmul(groups[rows], weight.t()).max(1)  # on a CPU 3 x faster than argmax
            out[rows], winners[rows] = best.values, best.indices.to(torch.uint8)
        ctx.save_for_backward(groups, winners)
        return out.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        groups, winners = ctx.saved_tensors
        gradient = gradients[
            0
        ].float()  # sums over thousands of groups: in fp32 whatever the weights are
        total = torch.zeros((gradient.shape[1], groups.shape[2]), device=gradient.device)
        for rows in _chunks(groups, gradient.shape[1]):
            index = winners[rows].long()[..., None].expand(-1, -1, groups.shape[2])
            total += (groups[rows].gather(1, index) * gradient[rows, :, None]).sum(0)
        return None, total.to(gradients[0].dtype), gradient.sum(0).to(gradients[0].dtype)


def _chunks(groups: torch.Tensor, width: int) -> Iterator[slice]:
    size = max(1, _CHUNK_ELEMENTS.get(groups.device.type, 1 << 20) // (groups.shape[1] * width))
    return (slice(start, start + size) for start in range(0, len(groups), size))


class PointEmbedding(nn.Conv2d):
    """A 1 x 1 convolution of 6 channels, then the maximum over each group of neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__(6, width, kernel_size=1)

    def forward(self, groups: torch.Tensor) -> torch.Tensor:
        """[G, K, 6] -> [G, width]; the groups get no gradient."""
        return _WidestOfGroup.apply(groups.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class PointTokenizer(nn.Module):
    """Groups of neighbours in COLOUR space (channels 3:6), as the reference does: [n, 8192, 6] -> [n, 1024, width].

    1024 farthest points are the centres, each with its 32 nearest points; all six channels of those, as they are.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = PointEmbedding(width)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[n, 8192, 6] -> [n, 1024, width]."""
        n = len(values)
        with torch.no_grad():
            points = values.float()
            colours = points[..., 3:6].contiguous()
            index = nearest_neighbours(colours, farthest_points(colours, CENTRES), NEIGHBOURS)
            flat = index.reshape(n, CENTRES * NEIGHBOURS, 1).expand(n, CENTRES * NEIGHBOURS, 6)
            groups = points.gather(1, flat).reshape(n * CENTRES, NEIGHBOURS, 6)
        return self.conv(groups).reshape(n, CENTRES, self.conv.out_channels)


class PointModality(Modality):
    """Coloured point clouds. The raw signal is [N, 6] fp32: positions, then colours in [0, 1] (`cloud_files.read_cloud`)."""

    name = "point"
    order = 3
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "point": ("point.npy", "ply", "pcd", "npy")
    }
    value_shape = (POINTS, 6)
    tokens = CENTRES

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> np.ndarray:
        """NumPy, PLY or PCD to [N, 6]."""
        return read_cloud(parts["point"])

    def transform(self, raw: np.ndarray, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """[8192, 6]: positions around their centroid, the farthest at distance 1; colours as they are.

        A cloud of another size is brought to 8192 points: fewer are all kept and some repeated, more are thinned out. Eval
        takes evenly spaced rows for both, training draws them.
        """
        if len(raw) < NEIGHBOURS:
            raise SampleError(
                f"a cloud of {len(raw)} points",
                f"one group of the tokenizer alone has {NEIGHBOURS}.",
                "drop the sample, or sample its surface more densely.",
            )
        cloud = raw if len(raw) == POINTS else raw[_rows_to_keep(len(raw), rng if train else None)]
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            centred = cloud[:, :3] - cloud[:, :3].mean(0)
            radius = float(np.sqrt((centred**2).sum(1)).max())
        if not np.isfinite(radius) or radius == 0:
            raise SampleError(
                f"a cloud of {len(raw)} points with the radius {radius}",
                "it cannot be scaled to radius 1.",
                "drop the sample; its points are all one, or too far apart for fp32.",
            )
        return torch.from_numpy(
            np.concatenate([centred / np.float32(radius), cloud[:, 3:]], 1).astype(
                np.float32, copy=False
            )
        )

    def tokenizer(self, width: int) -> nn.Module:
        """Grouping by colour, then a small PointNet."""
        return PointTokenizer(width)

    def preview(self, raw: np.ndarray) -> Image.Image:
        """The cloud from a corner, z up, 336 pixels a side."""
        return draw_cloud(raw[:, :3], raw[:, 3:])


def _rows_to_keep(count: int, rng: np.random.Generator | None) -> np.ndarray:
    """[8192] row numbers out of `count` != 8192; without `rng` evenly spaced."""
    if rng is None:
        return np.arange(POINTS) * count // POINTS
    if count > POINTS:
        return np.sort(rng.choice(count, POINTS, replace=False))
    return np.concatenate([np.arange(count), rng.integers(0, count, POINTS - count)])


MODALITY = PointModality()
