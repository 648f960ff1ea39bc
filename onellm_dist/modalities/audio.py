"""Sounds, as a log-mel spectrogram of 10.24 seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import nn

from onellm_dist.modalities.base import Modality, Part

if TYPE_CHECKING:
    from PIL import Image


class AudioTokenizer(nn.Module):
    """Patches of 16 x 16 with stride 10 over the spectrogram: [n, 1, 128, 1024] -> [n, 1212, width], row (mel) by row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, kernel_size=16, stride=10)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[n, 1, 128, 1024] -> [n, 1212, width]."""
        return self.conv(values.to(self.conv.weight.dtype)).flatten(2).transpose(1, 2)


class AudioModality(Modality):
    """Sounds, as a log-mel spectrogram of 10.24 seconds."""

    name = "audio"
    order = 2
    slots: ClassVar[Mapping[str, tuple[str, ...]]] = {"audio": ("wav", "flac", "ogg", "mp3", "opus", "m4a", "aac")}
    value_shape = (1, 128, 1024)
    tokens = 12 * 101

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def transform(self, raw: Any, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        raise NotImplementedError

    def tokenizer(self, width: int) -> nn.Module | None:
        return AudioTokenizer(width)

    def preview(self, raw: Any) -> Image.Image:
        raise NotImplementedError


MODALITY = AudioModality()
