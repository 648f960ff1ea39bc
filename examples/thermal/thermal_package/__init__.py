"""Thermal pictures: a ninth modality, in a package of its own.

One file is one sample: `NAME.npy` or `NAME.thermal.npy`, [64, 64], degrees Celsius.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Modality, Part
from onellm_dist.modalities.io.arrays import read_npy

SIDE = 64
PATCH = 16
ROOM_CELSIUS = 20.0
SCALE_CELSIUS = 10.0


class ThermalTokenizer(torch.nn.Module):
    """Patches of 16 x 16 pixels, each a token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, width, kernel_size=PATCH, stride=PATCH)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[n, 1, 64, 64] -> [n, 16, width]."""
        tokens: torch.Tensor = self.conv(values.to(self.conv.weight.dtype))
        return tokens.flatten(2).transpose(1, 2)


class Thermal(Modality):
    """Thermal pictures. The raw signal is an array [64, 64] fp32 in degrees Celsius."""

    name = "thermal"
    order = 8
    required_parts: ClassVar = {"thermal": ("thermal.npy", "npy")}
    value_shape = (1, SIDE, SIDE)
    tokens = (SIDE // PATCH) ** 2

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> np.ndarray:
        """The temperatures of a sample, checked."""
        array = read_npy(parts["thermal"])
        if array.shape != (SIDE, SIDE):
            raise SampleError(
                f"shape {array.shape}",
                f"a thermal picture is [{SIDE}, {SIDE}].",
                "resize it, or leave it out.",
            )
        return array.astype(np.float32)

    def transform(self, raw: np.ndarray, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """The model's input: [1, 64, 64], about 0 at room temperature."""
        return torch.from_numpy((raw - ROOM_CELSIUS) / SCALE_CELSIUS)[None]

    def build_tokenizer(self, width: int) -> torch.nn.Module:
        """The trainable module that makes tokens of the input."""
        return ThermalTokenizer(width)

    def preview(self, raw: np.ndarray) -> Image.Image:
        """A grey picture, for pages and reports."""
        return Image.fromarray((raw * 4).clip(0, 255).astype(np.uint8)).convert("RGB")


MODALITY = Thermal()
