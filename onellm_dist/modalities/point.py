"""Coloured point clouds, sampled to 8192 points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.drawing import draw_cloud
from onellm_dist.modalities.io.clouds import read_cloud
from onellm_dist.modalities.limits import LIMITS
from onellm_dist.modalities.transforms.cloud_sampling import (
    find_nearest_neighbours,
    sample_farthest_points,
)

POINTS = 8192
CENTRES = 1024
NEIGHBOURS = 32
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26, "meta": 1 << 26}
"""How many values of the wide intermediate exist at a time, by kind of device.

The planner counts on the meta device what a GPU would do."""


class _MaxOverGroup(torch.autograd.Function):
    """max over K of (groups [G, K, 6] @ weight [D, 6]^T + bias), [G, D].

    The intermediate [G, K, D] (134 MB per cloud at width 1024 in fp32) only exists chunk by chunk.
    For the backward pass one byte per output is kept: which of the K was the maximum.
    """

    @staticmethod
    def forward(
        ctx: Any, groups: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty((len(groups), len(weight)), dtype=weight.dtype, device=groups.device)
        winners = torch.empty(out.shape, dtype=torch.uint8, device=groups.device)
        for rows in _split_rows(groups, len(weight)):
            best = torch.matmul(groups[rows], weight.t()).max(1)  # on a CPU 3 x faster than argmax
            out[rows], winners[rows] = best.values, best.indices.to(torch.uint8)
        ctx.save_for_backward(groups, winners)
        return out.add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        groups, winners = ctx.saved_tensors
        # Sums over thousands of groups are in fp32, whatever the weights are.
        gradient = gradients[0].float()
        total = torch.zeros((gradient.shape[1], groups.shape[2]), device=gradient.device)
        for rows in _split_rows(groups, gradient.shape[1]):
            index = winners[rows].long()[..., None].expand(-1, -1, groups.shape[2])
            total += (groups[rows].gather(1, index) * gradient[rows, :, None]).sum(0)
        return None, total.to(gradients[0].dtype), gradient.sum(0).to(gradients[0].dtype)


def _split_rows(groups: torch.Tensor, width: int) -> Iterator[slice]:
    """Yield slices of groups whose intermediate fits into `_CHUNK_ELEMENTS`."""
    size = max(1, _CHUNK_ELEMENTS.get(groups.device.type, 1 << 20) // (groups.shape[1] * width))
    return (slice(start, start + size) for start in range(0, len(groups), size))


class PointEmbedding(nn.Conv2d):
    """A 1 x 1 convolution of 6 channels, then the maximum over each group of neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__(6, width, kernel_size=1)

    def forward(self, groups: torch.Tensor) -> torch.Tensor:
        """[G, K, 6] -> [G, width]; no gradient flows to the groups."""
        weight = self.weight.flatten(1)
        out: torch.Tensor = _MaxOverGroup.apply(groups.to(weight.dtype), weight, self.bias)
        return out


class PointTokenizer(nn.Module):
    """Embed groups of points that are neighbours in COLOUR space (channels 3:6), as the reference.

    The centres are 1024 farthest points. Each makes one token of its 32 nearest points, of which
    all six channels are used as they are.
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
            centres = sample_farthest_points(colours, CENTRES)
            index = find_nearest_neighbours(colours, centres, NEIGHBOURS)
            flat = index.reshape(n, CENTRES * NEIGHBOURS, 1).expand(n, CENTRES * NEIGHBOURS, 6)
            groups = points.gather(1, flat).reshape(n * CENTRES, NEIGHBOURS, 6)
        tokens: torch.Tensor = self.conv(groups)
        return tokens.reshape(n, CENTRES, self.conv.out_channels)


class PointModality(Modality):
    """Coloured point clouds.

    | | |
    |---|---|
    | files | `point`: point.npy, npy ([N, 6] or [6, N]), ply, pcd; 32 or more coloured points |
    | raw signal | [N, 6] fp32: x, y, z in the file's units, then red, green, blue in [0, 1] |
    | model input | [8192, 6]: positions centred and scaled to radius 1, then colours |
    | encoder tokens | 1024 groups of 32 points and the class token |

    Colours of bytes, or up to 255, are divided by 255 (see `io.clouds.read_cloud`).
    """

    name = "point"
    order = 3
    limits = LIMITS["point"]
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "point": ("point.npy", "ply", "pcd", "npy")
    }
    value_shape = (POINTS, 6)
    tokens = CENTRES

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> np.ndarray:
        """Decode NumPy, PLY or PCD to [N, 6]."""
        return read_cloud(parts["point"])

    def transform(self, raw: np.ndarray, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """[8192, 6]: positions centred and scaled to radius 1, colours as they are.

        A cloud of another size is brought to 8192 points: of fewer all are kept and some repeated,
        more are thinned out. Evaluation takes evenly spaced rows for both, training draws them.
        """
        if len(raw) < NEIGHBOURS:
            raise SampleError(
                f"a cloud of {len(raw)} points",
                f"a single group of the tokenizer has {NEIGHBOURS}.",
                "drop the sample, or sample its surface more densely.",
            )
        cloud = raw if len(raw) == POINTS else raw[_choose_rows(len(raw), rng if train else None)]
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            centred = cloud[:, :3] - cloud[:, :3].mean(0)
            radius = float(np.sqrt((centred**2).sum(1)).max())
        if not np.isfinite(radius) or radius == 0:
            raise SampleError(
                f"a cloud of {len(raw)} points with the radius {radius}",
                "it cannot be scaled to radius 1.",
                "drop the sample; its points coincide, or are too far apart for fp32.",
            )
        values = np.concatenate([centred / np.float32(radius), cloud[:, 3:]], 1)
        return torch.from_numpy(values.astype(np.float32, copy=False))

    def build_tokenizer(self, width: int) -> nn.Module:
        """Build the grouping by colour and its small PointNet."""
        return PointTokenizer(width)

    def preview(self, raw: np.ndarray) -> Image.Image:
        """The cloud from a corner, z up, 336 pixels a side."""
        return draw_cloud(raw[:, :3], raw[:, 3:])

    def draw_value(self, value: torch.Tensor) -> Image.Image:
        """The 8192 points from a corner, z up, 336 pixels a side."""
        return self.preview(value.numpy())


def _choose_rows(count: int, rng: np.random.Generator | None) -> np.ndarray:
    """[8192] row numbers below `count` != 8192; evenly spaced without `rng`."""
    if rng is None:
        return np.arange(POINTS) * count // POINTS
    if count > POINTS:
        return np.sort(rng.choice(count, POINTS, replace=False))
    return np.concatenate([np.arange(count), rng.integers(0, count, POINTS - count)])


MODALITY = PointModality()
