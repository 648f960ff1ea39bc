"""Inertial measurements: accelerometer and gyroscope, 2 seconds at 200 Hz."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from onellm_dist.modalities.base import Modality, Part

if TYPE_CHECKING:
    from PIL import Image


class ImuTokenizer(nn.Module):
    """A 1-D convolution of 10 samples over the six channels: [n, 6, 400] -> [n, 391, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, width, kernel_size=10, bias=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[n, 6, 400] -> [n, 391, width]."""
        return self.conv(values.to(self.conv.weight.dtype)).transpose(1, 2)


class ImuModality(Modality):
    """Inertial measurements: accelerometer and gyroscope, 2 seconds at 200 Hz."""

    name = "imu"
    order = 6
    slots: ClassVar[Mapping[str, tuple[str, ...]]] = {"imu": ("imu.npy", "imu.csv", "npy", "csv")}
    optional_slots: ClassVar[Mapping[str, tuple[str, ...]]] = {"timestamps": ("timestamps.npy", "imu_timestamps.npy")}
    value_shape = (6, 400)
    tokens = 391

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def transform(self, raw: Any, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        raise NotImplementedError

    def tokenizer(self, width: int) -> nn.Module | None:
        return ImuTokenizer(width)

    def preview(self, raw: Any) -> Image.Image:
        raise NotImplementedError


MODALITY = ImuModality()
