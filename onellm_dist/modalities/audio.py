"""Sounds: a log-mel spectrogram of the first 10.24 seconds, or of several such windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import SampleError
from onellm_dist.common.media_size import MediaSize
from onellm_dist.modalities.base import Modality, Part
from onellm_dist.modalities.drawing import draw_heatmap
from onellm_dist.modalities.io.arrays import require_finite
from onellm_dist.modalities.io.sounds import (
    AUDIO_EXTENSIONS,
    encode_wave,
    make_wave,
    measure_sound,
    read_sound,
)
from onellm_dist.modalities.limits import LIMITS, check_rate
from onellm_dist.modalities.transforms.fbank import MELS, RATE, SHIFT, WINDOW, compute_fbank
from onellm_dist.modalities.transforms.resample import resample

FRAMES = 1024
SECONDS = 10.3
"""Length that is read of a file: 1024 frames need 10.255 s, and resampling a little more."""
WINDOW_SECONDS = 10.24
"""What one span hears of a recording, where `data.spans` allows several."""
SHORTEST_REST = 1.0
"""Seconds that a last window has at least."""
FREQUENCY_MASK = 48
TIME_MASK = 192
MEAN = -4.2677393
"""Mean of AudioSet's filter bank (AST)."""
DEVIATION = 4.5689974
"""Standard deviation of AudioSet's filter bank; the reference divides by TWICE this value."""
_PEAK = 100.0
"""Largest absolute value of a wave: 40 dB above full scale."""


@dataclass(frozen=True)
class Sound:
    """The first channel of a recording's first 10.3 seconds.

    Attributes:
        wave: [N] fp32, full scale at 1.
        rate: samples per second.
    """

    wave: np.ndarray
    rate: int


class AudioTokenizer(nn.Module):
    """Patches of 16 x 16 with stride 10 over the spectrogram, in the order row (mel) by row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, kernel_size=16, stride=10)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """[n, 1, 128, 1024] -> [n, 1212, width]."""
        patches: torch.Tensor = self.conv(values.to(self.conv.weight.dtype))
        return patches.flatten(2).transpose(1, 2)


class AudioModality(Modality):
    """Sounds of any length, of which the first 10.24 seconds of the first channel count.

    | | |
    |---|---|
    | files | `audio`: wav, flac, ogg, mp3, opus, m4a, aac, aiff, aif, aifc, au, caf, w64, oga, |
    | | weba, mka, mp2, wma, amr, ac3; 100 Hz to 1 MHz, up to 256 channels |
    | raw signal | `Sound`: [N] fp32, full scale at 1, at the file's own rate |
    | model input | [1, 128, 1024]: log-mel energies at 16 kHz, 10 ms per frame, standardised |
    | encoder tokens | 12 x 101 = 1212 patches and the class token |
    | spans | one; of several, windows of 10.24 s one after another |

    libsndfile reads WAV, FLAC, Ogg, AIFF and AU; FFmpeg reads everything else, and what libsndfile
    gives up on. The bytes decide, not the extension. Taking the first channel and 10.24 seconds is
    what the reference does. Of several sounds in a container the one marked as default is taken,
    and no commentary.

    *Damage.* Packets that cannot be decoded, and what a header states but the file lacks, are left
    out and noted. If more than a quarter of the first 10.3 s is missing, the file is refused.
    Padding and tags before or behind the sound cost nothing.

    *Loudness.* Nothing is clipped or normalised: floats beyond full scale stay as they are, as in
    libsndfile, torchaudio and librosa. A peak above 100 (40 dB beyond full scale) is refused: such
    a file is damaged, or holds integers (of 16 bits, say) as floats.
    """

    name = "audio"
    order = 2
    limits = LIMITS["audio"]
    required_parts: ClassVar[Mapping[str, tuple[str, ...]]] = {"audio": AUDIO_EXTENSIONS}
    value_shape = (1, MELS, FRAMES)
    tokens = 12 * 101
    augments_spans = True

    def decode(self, parts: Mapping[str, Part], meta: Mapping[str, Any]) -> Sound:
        """Read the beginning of the recording, at its own rate."""
        part = parts["audio"]
        wave, rate = read_sound(part, SECONDS)
        require_finite(wave, f".{part.extension}")
        _check_peak(wave, f".{part.extension}")
        return Sound(wave, rate)

    def measure(self, parts: Mapping[str, Part]) -> MediaSize:
        """Read the length of the recording from its header."""
        return MediaSize(seconds=measure_sound(parts["audio"]))

    def count_spans(self, size: MediaSize, most: int) -> int:
        """One span for each window of 10.24 s; a rest of less than a second has none."""
        windows = math.floor(max(0.0, size.seconds - SHORTEST_REST) / WINDOW_SECONDS) + 1
        return min(most, windows)

    def decode_spans(
        self, parts: Mapping[str, Part], meta: Mapping[str, Any], spans: int
    ) -> list[Sound]:
        """Windows of 10.24 s; what the file lacks of them, against its header, is silence."""
        part = parts["audio"]
        wave, rate = read_sound(part, (spans - 1) * WINDOW_SECONDS + SECONDS)
        require_finite(wave, f".{part.extension}")
        _check_peak(wave, f".{part.extension}")
        least = math.ceil(WINDOW * rate / RATE)
        windows = []
        for number in range(spans):
            start = round(number * WINDOW_SECONDS * rate)
            window = wave[start : start + math.ceil(SECONDS * rate)]
            if len(window) < least and number:
                window = np.pad(window, (0, least - len(window)))
            windows.append(Sound(window, rate))
        return windows

    def make_raw(self, item: Any) -> Any:
        """Take a mapping with `array` and `sampling_rate`, as datasets give sounds.

        The array is [N], [channels, N] or [N, channels]; 16- and 32-bit integers are full scale at
        the largest of their type.
        """
        sound = self._read_array(item)
        if sound is None:
            return item
        return Sound(sound.wave[: math.ceil(SECONDS * sound.rate)], sound.rate)

    def make_parts(self, item: Any) -> dict[str, Part] | None:
        """All of the sound that `make_raw` takes the beginning of, as a file."""
        sound = self._read_array(item)
        return None if sound is None else {"audio": encode_wave(sound.wave, sound.rate)}

    def _read_array(self, item: Any) -> Sound | None:
        if not isinstance(item, Mapping) or not {"array", "sampling_rate"} <= item.keys():
            return None
        wave = make_wave(np.asarray(item["array"]))
        require_finite(wave, "the array")
        _check_peak(wave, "the array")
        rate = int(item["sampling_rate"])
        check_rate(self.limits, rate, "the array")
        return Sound(wave, rate)

    def is_one_medium(self, items: Sequence[Any]) -> bool:
        """Numbers are one sound."""
        return bool(items) and isinstance(items[0], int | float)

    def transform(self, raw: Sound, *, train: bool, rng: np.random.Generator) -> torch.Tensor:
        """[1, 128, 1024]: resampled to 16 kHz, Kaldi's filter bank, zeros after the end.

        Training sets one band of mels and one band of frames to zero.
        """
        bank = torch.zeros(FRAMES, MELS)
        features = _compute_features(raw)
        bank[: len(features)] = features
        if train:
            _mask_band(bank, 1, FREQUENCY_MASK, rng)
            _mask_band(bank, 0, TIME_MASK, rng)
        return bank.sub_(MEAN).div_(2 * DEVIATION).t().contiguous()[None]

    def build_tokenizer(self, width: int) -> nn.Module:
        """Build a 2-D convolution over the spectrogram."""
        return AudioTokenizer(width)

    def preview(self, raw: Sound) -> Image.Image:
        """The spectrogram, low notes at the bottom, 448 x 224."""
        features = _compute_features(raw).numpy()
        return draw_heatmap(features.T[::-1], (448, 224))

    def draw_value(self, value: torch.Tensor) -> Image.Image:
        """The filter bank, low notes at the bottom, what is filled up in grey, 448 x 224."""
        bank = value[0].numpy()[::-1]
        sounding = int(np.flatnonzero((bank != bank[0, -1]).any(0)).max(initial=-1)) + 1
        picture = Image.new("RGB", (448, 224), (128, 128, 128))
        if sounding:
            width = max(1, 448 * sounding // bank.shape[1])
            picture.paste(draw_heatmap(bank[:, :sounding], (width, 224)))
        return picture


def _check_peak(wave: np.ndarray, name: str) -> None:
    peak = float(np.abs(wave).max(initial=0.0))
    if peak > _PEAK:
        raise SampleError(
            f"{name} has a peak of {peak:g}; full scale is 1, and the limit is {_PEAK:g}",
            "its values are in another unit, or damaged: the spectrogram would mean nothing.",
            "divide samples of 16-bit integers by 32768, or drop the sample.",
        )


def _compute_features(raw: Sound) -> torch.Tensor:
    """[frames <= 1024, 128] log-mel energies.

    Raises:
        SampleError: the sound is shorter than one window of 25 ms.
    """
    if raw.rate <= 0 or len(raw.wave) * RATE < WINDOW * raw.rate:
        raise SampleError(
            f"{format_count(len(raw.wave), 'sample')} of sound at {raw.rate} Hz",
            "a spectrogram needs at least 25 ms.",
            "drop the sample; its file is empty or cut short.",
        )
    wave = resample(raw.wave, raw.rate, RATE)[: (FRAMES - 1) * SHIFT + WINDOW]
    return compute_fbank(wave - wave.mean())


def _mask_band(bank: torch.Tensor, axis: int, limit: int, rng: np.random.Generator) -> None:
    """Zero fewer than `limit` rows along `axis`, drawn as in torchaudio's mask_along_axis."""
    length = rng.uniform() * limit
    start = int(rng.uniform() * (bank.shape[axis] - length))
    bank.narrow(axis, start, int(length)).zero_()


MODALITY = AudioModality()
