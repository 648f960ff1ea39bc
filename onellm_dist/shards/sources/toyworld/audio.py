"""Toy sounds (`flac`, 16 kHz mono, 10.24 seconds: the model's window): source, rhythm, loudness.

A patch of the spectrogram (16 mel bins x 160 ms) shows source and loudness by itself. The rhythm is
how many patches sound and how many contain an onset. So nothing depends on absolute positions,
which the model learns slowly.
"""

from __future__ import annotations

import io
import math

import numpy as np
import soundfile

from onellm_dist.shards.sources.toyworld.draws import RenderedMedia
from onellm_dist.shards.sources.toyworld.world import Attributes

RATE = 16_000
SAMPLES = 163_840
_DECIBEL = {"loud": 0.0, "moderate": -18.0, "faint": -36.0}
_ROOT_MEAN_SQUARE = {"tone": 0.056, "hiss": 0.024, "buzz": 0.05, "siren": 0.028, "rumble": 0.28}
"""Level of a loud source while it sounds.

It makes the brightest log-mel bin of a frame equal for all sources (0.6 in the model's input)."""
_RAMP_SECONDS = 0.01


def make_wave(attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
    """Make the sound, [163840] fp64 in -1..1."""
    source = _make_source(attributes["sound"], rng)
    source *= _ROOT_MEAN_SQUARE[attributes["sound"]] / math.sqrt(float(np.mean(source**2)))
    gain = 10 ** ((_DECIBEL[attributes["loudness"]] + rng.uniform(-3, 3)) / 20)
    return np.asarray(np.clip(source * gain * _make_envelope(attributes["rhythm"], rng), -1, 1))


def _make_source(sound: str, rng: np.random.Generator) -> np.ndarray:
    """The sound without rhythm, [163840], at any loudness."""
    time = np.arange(SAMPLES) / RATE
    if sound == "tone":
        return np.asarray(np.sin(2 * math.pi * rng.uniform(600, 1200) * time))
    if sound == "buzz":
        pitch = rng.uniform(200, 260)
        harmonics = (
            np.sin(2 * math.pi * pitch * k * time + rng.uniform(0, 6)) for k in range(1, 9)
        )
        return np.asarray(sum(harmonics, np.zeros(SAMPLES)))
    if sound == "siren":  # up and down, fast enough to move within a patch
        period, low, high = rng.uniform(0.5, 0.7), rng.uniform(450, 650), rng.uniform(2600, 3400)
        sweep = low * (high / low) ** np.abs(2 * ((time / period) % 1) - 1)
        return np.asarray(np.sin(2 * math.pi * np.cumsum(sweep) / RATE))
    noise = rng.normal(size=SAMPLES)
    if sound == "hiss":
        return noise
    spectrum = np.fft.rfft(noise)  # a rumble has nothing above 250 to 350 Hz
    spectrum *= 1 / (1 + (np.fft.rfftfreq(SAMPLES, 1 / RATE) / rng.uniform(250, 350)) ** 8)
    return np.fft.irfft(spectrum, SAMPLES)


def _make_envelope(rhythm: str, rng: np.random.Generator) -> np.ndarray:
    """The loudness over time, [163840] in 0..1, with ramps of 10 ms."""
    time = np.arange(SAMPLES) / RATE
    if rhythm == "steadily":
        return np.ones(SAMPLES)
    if rhythm == "once":
        start, length = rng.uniform(1, 6), rng.uniform(2.2, 2.8)
        sounds = (time >= start) & (time < start + length)
    else:
        # A quick period fits into one patch, a slow one has whole patches of sound and of silence.
        period = rng.uniform(1.0, 1.2) if rhythm == "slowly" else rng.uniform(0.14, 0.18)
        sounds = ((time / period + rng.uniform()) % 1) < 0.5
    ramp = int(_RAMP_SECONDS * RATE)
    running = np.cumsum(np.concatenate([np.zeros(ramp), sounds]))
    return np.asarray((running[ramp:] - running[:-ramp]) / ramp)


def render(attributes: Attributes, rng: np.random.Generator) -> RenderedMedia:
    """Render a sound sample."""
    out = io.BytesIO()
    wave = np.rint(make_wave(attributes, rng) * 32767).astype(np.int16)
    soundfile.write(out, wave, RATE, format="FLAC", subtype="PCM_16")
    return RenderedMedia({"flac": out.getvalue()})
