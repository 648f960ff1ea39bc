"""Toy sounds: one source, a rhythm, a loudness. `flac`, 16 kHz mono, 10.24 seconds (the model's whole window).

A patch of the spectrogram (16 mel bins x 160 ms) tells source and loudness by itself; the rhythm is how many patches sound
and how many hold an onset. So nothing hangs on absolute positions, which are slow to learn from their small start.
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
"""Of a loud source while it sounds: chosen so that the brightest log-mel bin of a frame is the same for all (model input 0.6)."""
_RAMP_SECONDS = 0.01


def make_wave(attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
    """[163840] fp64 in -1..1."""
    source = _source(attributes["sound"], rng)
    source *= _ROOT_MEAN_SQUARE[attributes["sound"]] / math.sqrt(float(np.mean(source**2)))
    gain = 10 ** ((_DECIBEL[attributes["loudness"]] + rng.uniform(-3, 3)) / 20)
    return np.clip(source * gain * _envelope(attributes["rhythm"], rng), -1, 1)


def _source(sound: str, rng: np.random.Generator) -> np.ndarray:
    """An endless sound, [163840], any loudness."""
    time = np.arange(SAMPLES) / RATE
    if sound == "tone":
        return np.sin(2 * math.pi * rng.uniform(600, 1200) * time)
    if sound == "buzz":
        pitch = rng.uniform(200, 260)
        return sum(
            (np.sin(2 * math.pi * pitch * k * time + rng.uniform(0, 6)) for k in range(1, 9)),
            np.zeros(SAMPLES),
        )
    if sound == "siren":  # up and down, fast enough to move within a patch
        period, low, high = rng.uniform(0.5, 0.7), rng.uniform(450, 650), rng.uniform(2600, 3400)
        sweep = low * (high / low) ** np.abs(2 * ((time / period) % 1) - 1)
        return np.sin(2 * math.pi * np.cumsum(sweep) / RATE)
    noise = rng.normal(size=SAMPLES)
    if sound == "hiss":
        return noise
    spectrum = np.fft.rfft(noise)  # rumble: nothing above 250 to 350 Hz
    spectrum *= 1 / (1 + (np.fft.rfftfreq(SAMPLES, 1 / RATE) / rng.uniform(250, 350)) ** 8)
    return np.fft.irfft(spectrum, SAMPLES)


def _envelope(rhythm: str, rng: np.random.Generator) -> np.ndarray:
    """Whether it sounds, [163840] in 0..1, with ramps of 10 ms."""
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
    return (running[ramp:] - running[:-ramp]) / ramp


def render(attributes: Attributes, rng: np.random.Generator) -> RenderedMedia:
    """One sound sample."""
    out = io.BytesIO()
    soundfile.write(
        out,
        np.rint(make_wave(attributes, rng) * 32767).astype(np.int16),
        RATE,
        format="FLAC",
        subtype="PCM_16",
    )
    return RenderedMedia({"flac": out.getvalue()})
