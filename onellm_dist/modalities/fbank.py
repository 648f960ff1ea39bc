"""Kaldi's log-mel filter bank as OneLLM takes it (torchaudio `compliance.kaldi.fbank` 2.x: 128 bins, Hann, no dither, power)."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

RATE = 16_000
MELS = 128
WINDOW = 400
"""25 ms."""
SHIFT = 160
"""10 ms."""
_FFT = 512
_PREEMPHASIS = 0.97
_LOWEST_HZ = 20.0


def _mel(hertz: torch.Tensor) -> torch.Tensor:
    return 1127.0 * torch.log1p(hertz / 700.0)


@cache
def _mel_bank() -> torch.Tensor:
    """[257, 128] fp32: triangles of equal width on the mel scale between 20 Hz and 8 kHz; the Nyquist bin has no weight."""
    low, high = _mel(torch.tensor([_LOWEST_HZ, RATE / 2], dtype=torch.float64))
    edges = low + torch.arange(MELS + 2, dtype=torch.float64) * (high - low) / (MELS + 1)
    bins = _mel(torch.arange(_FFT // 2, dtype=torch.float64) * (RATE / _FFT))[:, None]
    up = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    bank = torch.minimum(up, down).clamp_(min=0)
    return torch.cat([bank, torch.zeros(1, MELS, dtype=torch.float64)]).float()


@cache
def _window() -> torch.Tensor:
    return torch.hann_window(WINDOW, periodic=False, dtype=torch.float64).float()


def fbank(wave: np.ndarray) -> torch.Tensor:
    """[N] fp32 at 16 kHz, N >= 400 -> [1 + (N - 400) // 160, 128] fp32, natural log of the mel energies.

    Frames that do not fit whole are dropped (Kaldi's snip_edges). Each frame's mean is subtracted, so that a constant
    offset of the wave changes nothing.
    """
    frames = torch.from_numpy(wave).unfold(0, WINDOW, SHIFT)
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], 1)
    frames = (frames - _PREEMPHASIS * before) * _window()
    spectrum = torch.fft.rfft(frames, _FFT)
    power = spectrum.real.square() + spectrum.imag.square()
    return (power @ _mel_bank()).clamp_(min=torch.finfo(torch.float32).eps).log_()
