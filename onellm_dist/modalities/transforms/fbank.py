"""Kaldi's log-mel filter bank as OneLLM uses it.

Equal to torchaudio 2.x `compliance.kaldi.fbank` with 128 bins, a Hann window, no dither, power.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

RATE = 16_000
"""Hz."""
MELS = 128
WINDOW = 400
"""Samples per frame: 25 ms."""
SHIFT = 160
"""Samples from frame to frame: 10 ms."""
_FFT = 512
_PREEMPHASIS = 0.97
_LOWEST_HZ = 20.0


def compute_fbank(wave: np.ndarray) -> torch.Tensor:
    """Compute log-mel energies.

    Frames that do not fit completely are dropped (Kaldi's snip_edges). Each frame's mean is
    subtracted, so that a constant offset of the wave changes nothing.

    Args:
        wave: [N] fp32 at 16 kHz, N >= 400.

    Returns:
        [1 + (N - 400) // 160, 128] fp32, natural logarithms.
    """
    frames = torch.from_numpy(wave).unfold(0, WINDOW, SHIFT)
    frames = frames - frames.mean(1, keepdim=True)
    before = torch.cat([frames[:, :1], frames[:, :-1]], 1)
    frames = (frames - _PREEMPHASIS * before) * _hann_window()
    spectrum = torch.fft.rfft(frames, _FFT)
    power: torch.Tensor = spectrum.real.square() + spectrum.imag.square()
    return (power @ _mel_bank()).clamp_(min=torch.finfo(torch.float32).eps).log_()


def _to_mel(hertz: torch.Tensor) -> torch.Tensor:
    return 1127.0 * torch.log1p(hertz / 700.0)


@cache
def _mel_bank() -> torch.Tensor:
    """[257, 128] fp32: triangles of equal width on the mel scale between 20 Hz and 8 kHz.

    The Nyquist bin has no weight.
    """
    low, high = _to_mel(torch.tensor([_LOWEST_HZ, RATE / 2], dtype=torch.float64))
    edges = low + torch.arange(MELS + 2, dtype=torch.float64) * (high - low) / (MELS + 1)
    bins = _to_mel(torch.arange(_FFT // 2, dtype=torch.float64) * (RATE / _FFT))[:, None]
    up = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    down = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    bank = torch.minimum(up, down).clamp_(min=0)
    return torch.cat([bank, torch.zeros(1, MELS, dtype=torch.float64)]).float()


@cache
def _hann_window() -> torch.Tensor:
    return torch.hann_window(WINDOW, periodic=False, dtype=torch.float64).float()
