"""What image, depth and normal share: their model input is CLIP's normalisation of 8-bit pixels.

The loader carries the pixels, a quarter of the bytes, and the model normalises them on its device
(`model/pixels.py`) to the very numbers that `transform` gives.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch

from onellm_dist.modalities.base import Modality
from onellm_dist.modalities.transforms.crops import LARGEST, normalise


class PixelModality(Modality):
    """A modality whose model input has [3, height, width] as its last dimensions, from pixels."""

    @abstractmethod
    def cut_pixels(self, raw: Any, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """Crop the raw signal: `value_shape`, uint8.

        Args:
            raw: as of `transform`.
            train: as of `transform`.
            rng: as of `transform`.
        """

    def transform(self, raw: Any, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """The pixels of `cut_pixels` with CLIP's mean and standard deviation."""
        return normalise(self.cut_pixels(raw, train=train, rng=rng))

    @property
    def carries_pixels(self) -> bool:
        """Whether the loader carries pixels.

        Not where a subclass makes its values itself, or refuses some that pixels can have: bytes
        would pass by its checks.
        """
        own = type(self)
        return (
            own.transform is PixelModality.transform
            and own.make_value is Modality.make_value
            and self.limits.magnitude >= LARGEST
        )

    @property
    def loader_dtype(self) -> torch.dtype:
        """uint8, if the loader carries pixels."""
        return torch.uint8 if self.carries_pixels else super().loader_dtype

    def make_loader_value(self, raw: Any, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """The pixels: any byte is a plausible one, so there is nothing to check."""
        if not self.carries_pixels:
            return super().make_loader_value(raw, train=train, rng=rng)
        return self.cut_pixels(raw, train=train, rng=rng)
