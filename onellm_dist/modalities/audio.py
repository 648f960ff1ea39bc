"""Sounds, as a log-mel spectrogram of 10.24 seconds."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import nn

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.drawing import heat
from onellm_dist.modalities.fbank import MELS, RATE, SHIFT, WINDOW, fbank
from onellm_dist.modalities.io.arrays import require_finite
from onellm_dist.modalities.io.containers import first_channel
from onellm_dist.modalities.io.resample import resample

FRAMES = 1024
SECONDS = 10.3
"""What is read of a file: 1024 frames need 10.255 s, and resampling a little more."""
FREQUENCY_MASK, TIME_MASK = 48, 192
MEAN, DEVIATION = -4.2677393, 4.5689974
"""AudioSet's statistics (AST); the reference divides by TWICE the deviation."""
_SOUNDFILE_MAGIC = (b"RIFF", b"RIFX", b"RF64", b"fLaC", b"OggS", b"FORM", b".snd")


@dataclass(frozen=True)
class Sound:
    """The first channel of a recording's first 10.3 seconds: `wave` [N] fp32 in [-1, 1], `rate` in Hz."""

    wave: np.ndarray
    rate: int


class AudioTokenizer(nn.Module):
    """Patches of 16 x 16 with stride 10 over the spectrogram: [n, 1, 128, 1024] -> [n, 1212, width], row (mel) by row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, kernel_size=16, stride=10)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[n, 1, 128, 1024] -> [n, 1212, width]."""
        return self.conv(values.to(self.conv.weight.dtype)).flatten(2).transpose(1, 2)


class AudioModality(Modality):
    """Sounds. The raw signal is a `Sound`.

    WAV, FLAC, Ogg and AIFF are read by libsndfile, everything else by FFmpeg; what the file is called does not matter.
    As in the reference, only the first channel and the first 10.24 seconds count.
    """

    name = "audio"
    order = 2
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "audio": ("wav", "flac", "ogg", "mp3", "opus", "m4a", "aac")
    }
    value_shape = (1, MELS, FRAMES)
    tokens = 12 * 101

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Sound:
        """The start of the recording, at its own rate."""
        part = parts["audio"]
        wave, rate = (
            _read_soundfile(part)
            if part.data[:4] in _SOUNDFILE_MAGIC
            else first_channel(part, SECONDS)
        )
        require_finite(wave, f".{part.extension}")
        return Sound(wave, rate)

    def transform(self, raw: Sound, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """[1, 128, 1024]: 16 kHz, Kaldi filter bank, zeros behind the end, in training one mel and one time band of zeros."""
        bank = torch.zeros(FRAMES, MELS)
        features = _features(raw)
        bank[: len(features)] = features
        if train:
            _mask(bank, 1, FREQUENCY_MASK, rng)
            _mask(bank, 0, TIME_MASK, rng)
        return bank.sub_(MEAN).div_(2 * DEVIATION).t().contiguous()[None]

    def tokenizer(self, width: int) -> nn.Module:
        """A 2-D convolution over the spectrogram."""
        return AudioTokenizer(width)

    def preview(self, raw: Sound) -> Image.Image:
        """The spectrogram, low notes at the bottom, 448 x 224."""
        features = _features(raw).numpy()
        return heat(features.T[::-1], (448, 224))


def _read_soundfile(part: Part) -> tuple[np.ndarray, int]:
    try:
        with soundfile.SoundFile(io.BytesIO(part.data)) as file:
            rate = int(file.samplerate)
            wave = file.read(int(SECONDS * rate), dtype="float32", always_2d=True)[:, 0]
    except (
        Exception
    ) as error:  # LibsndfileError, and ValueError or RuntimeError of its wrapper on broken headers
        raise SampleError(
            f".{part.extension} ({len(part.data)} bytes) is no readable audio: {error}",
            "the sample has no usable sound.",
            "download or encode it again, or drop the sample.",
        ) from error
    return np.ascontiguousarray(wave), rate


def _features(raw: Sound) -> torch.Tensor:
    """[frames <= 1024, 128] log-mel energies.

    Raises:
        SampleError: not one whole window of 25 ms.
    """
    if raw.rate <= 0 or len(raw.wave) * RATE < WINDOW * raw.rate:
        raise SampleError(
            f"{len(raw.wave)} samples of sound at {raw.rate} Hz",
            "a spectrogram needs 25 ms at least.",
            "drop the sample; its file is empty or cut short.",
        )
    wave = resample(raw.wave, raw.rate, RATE)[: (FRAMES - 1) * SHIFT + WINDOW]
    return fbank(wave - wave.mean())


def _mask(bank: torch.Tensor, axis: int, limit: int, rng: np.random.Generator) -> None:
    """Zero a band of fewer than `limit` rows along `axis`, as torchaudio's mask_along_axis draws it."""
    length = rng.uniform() * limit
    start = int(rng.uniform() * (bank.shape[axis] - length))
    bank.narrow(axis, start, int(length)).zero_()


MODALITY = AudioModality()
