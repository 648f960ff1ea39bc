"""Pixels to the encoder's input, on the device they are on."""

from __future__ import annotations

import torch

from onellm_dist.common.errors import OneLLMError
from onellm_dist.modalities import get_modality
from onellm_dist.modalities.pixels import PixelModality
from onellm_dist.modalities.transforms.crops import CLIP_MEAN, CLIP_STD, check_pixels
from onellm_dist.model.sequence_lengths import to_device_tensor


def normalise_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Apply CLIP's mean and standard deviation: the numbers of `transforms.crops.normalise`.

    It divides by tensors: in place of a division by a host's number, CUDA multiplies with the
    reciprocal, which rounds otherwise.

    Args:
        pixels: [..., 3, height, width] uint8.

    Returns:
        The same shape in fp32.

    Raises:
        OneLLMError: as of `check_pixels`.
    """
    check_pixels(pixels)
    numbers = to_device_tensor([(255.0,) * 3, CLIP_MEAN, CLIP_STD], pixels.device, torch.float32)
    most, mean, deviation = numbers[:, :, None, None]
    return pixels.to(torch.float32).div_(most).sub_(mean).div_(deviation)


def make_input(name: str, value: torch.Tensor) -> torch.Tensor:
    """The values of a modality as its tokenizer or the encoder reads them: pixels are normalised.

    Args:
        name: the modality.
        value: [n, *value_shape], floats or pixels (uint8).

    Raises:
        OneLLMError: these are bytes, and the modality's input is not made of pixels, or they are
            not RGB.
    """
    if value.dtype != torch.uint8:
        return value
    modality = get_modality(name)
    if isinstance(modality, PixelModality) and modality.carries_pixels:
        return normalise_pixels(value)
    raise OneLLMError(
        f"{name} values are uint8",
        "the input of this modality is not made of 8-bit pixels.",
        "use the modality's own transform (OneLLMProcessor does).",
    )
