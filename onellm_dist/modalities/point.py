"""Coloured point clouds of 8192 points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.clouds import farthest_points, nearest_neighbours

if TYPE_CHECKING:
    from PIL import Image

POINTS, CENTRES, NEIGHBOURS = 8192, 1024, 32
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 27}


class PointEmbedding(nn.Conv2d):
    """A 1 x 1 convolution of 6 channels, then the maximum over each group of neighbours.

    The wide intermediate [groups, neighbours, width] (134 MB a cloud at width 1024 in fp32) is only made in chunks, without
    gradient, to find which neighbour wins each channel; the output is then computed from the winners alone, with gradient.
    """

    def __init__(self, width: int) -> None:
        super().__init__(6, width, kernel_size=1)

    def forward(self, groups: torch.Tensor) -> torch.Tensor:
        """[G, K, 6] -> [G, width]."""
        weight = self.weight.flatten(1)  # [width, 6]
        groups = groups.to(weight.dtype)
        winners = torch.empty((len(groups), len(weight)), dtype=torch.int64, device=groups.device)
        chunk = max(1, _CHUNK_ELEMENTS.get(groups.device.type, 1 << 20) // (groups.shape[1] * len(weight)))
        with torch.no_grad():
            for start in range(0, len(groups), chunk):
                part = groups[start : start + chunk]
                winners[start : start + chunk] = torch.matmul(part, weight.t()).max(1).indices  # on a CPU 3 x faster than argmax
        chosen = groups.gather(1, winners[..., None].expand(-1, -1, 6))  # [G, width, 6]: sizes of G x width, not G x K x width
        assert self.bias is not None
        return (chosen * weight).sum(-1) + self.bias


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
    """Coloured point clouds of 8192 points."""

    name = "point"
    order = 3
    slots: ClassVar[Mapping[str, tuple[str, ...]]] = {"point": ("point.npy", "npy", "ply", "pcd")}
    value_shape = (POINTS, 6)
    tokens = CENTRES

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def transform(self, raw: Any, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        raise NotImplementedError

    def tokenizer(self, width: int) -> nn.Module | None:
        return PointTokenizer(width)

    def preview(self, raw: Any) -> Image.Image:
        raise NotImplementedError


MODALITY = PointModality()
