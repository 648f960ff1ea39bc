"""Toy motions: what a head-worn sensor reads. `imu.npy`, [6, 400] fp32 at 200 Hz: acceleration x y z in g, angular rate x y z in rad/s.

Axes: x forward, y left, z up. The lean turns the sensor against gravity; the activity moves it; the pace sets rate and force.
"""

from __future__ import annotations

import io
import math

import numpy as np

from onellm_dist.shards.sources.toyworld.draws import RenderedMedia
from onellm_dist.shards.sources.toyworld.world import Attributes

RATE, SAMPLES = 200, 400
_LEAN = {"left": (-1, 0), "right": (1, 0), "forward": (0, 1), "back": (0, -1)}
"""Turn about x and about y, in units of the lean's angle."""
_PACE = {"slowly": 0, "steadily": 1, "quickly": 2}
_STEPS = (1.1, 1.9, 3.0)
_STEP_FORCE = (0.18, 0.38, 0.75)
_LEAPS = (0.9, 1.5, 2.3)
_LEAP_FORCE = (0.9, 1.6, 2.6)
_TURN_RATE = (0.6, 1.5, 3.2)
_NODS = (0.8, 1.5, 2.6)
_NOD_RATE = (0.6, 1.4, 2.8)
"""By pace: cycles a second; g; rad/s."""
_SHAKE = (0.02, 0.09, 0.28)
"""By pace: how much the sensor shakes, g and half as many rad/s. The one sign of the pace that is the same in all activities."""


def make_trace(attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
    """[6, 400] fp64."""
    pace = _PACE[attributes["pace"]]
    acceleration, spin = _MOTIONS[attributes["activity"]](pace, rng)
    acceleration[2] += 1.0  # at rest the sensor reads gravity, upwards
    about_x, about_y = (
        part * math.radians(rng.uniform(25, 35)) for part in _LEAN[attributes["lean"]]
    )
    turn = _turn(about_x, about_y)
    signals = np.concatenate([turn.T @ acceleration, turn.T @ spin])
    shake = _SHAKE[pace] * rng.uniform(0.8, 1.2) * np.array([1.0, 1.0, 1.0, 0.5, 0.5, 0.5])
    return signals + shake[:, None] * rng.normal(size=signals.shape)


def _phase(rate: float, rng: np.random.Generator) -> np.ndarray:
    """A running phase at about `rate` cycles a second, [400] in cycles."""
    return np.arange(SAMPLES) / RATE * rate * rng.uniform(0.9, 1.1) + rng.uniform()


def _walk(pace: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    phase, force = (
        2 * math.pi * _phase(_STEPS[pace], rng),
        _STEP_FORCE[pace] * rng.uniform(0.85, 1.15),
    )
    acceleration = force * np.stack(
        [0.3 * np.sin(phase + 1), 0.4 * np.sin(phase / 2), np.sin(phase) + 0.3 * np.sin(2 * phase)]
    )
    spin = force * np.stack([0.5 * np.sin(phase / 2), 0.2 * np.sin(phase), 0.3 * np.cos(phase / 2)])
    return acceleration, spin


def _jump(pace: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    phase, force = _phase(_LEAPS[pace], rng) % 1, _LEAP_FORCE[pace] * rng.uniform(0.85, 1.15)
    in_air = phase < 0.45
    push = np.where(in_air, -1.0, force * np.sin(math.pi * (phase - 0.45) / 0.55))
    acceleration = np.stack([0.1 * push, np.zeros(SAMPLES), push])
    return acceleration, np.stack([np.zeros(SAMPLES), 0.15 * push, np.zeros(SAMPLES)])


def _swivel(pace: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    rate = _TURN_RATE[pace] * rng.uniform(0.85, 1.15) * rng.choice((-1, 1))
    wobble = 1 + 0.1 * np.sin(2 * math.pi * _phase(0.7, rng))
    spin = np.stack([np.zeros(SAMPLES), np.zeros(SAMPLES), rate * wobble])
    return np.stack([np.full(SAMPLES, -0.02 * rate**2), np.zeros(SAMPLES), np.zeros(SAMPLES)]), spin


def _nod(pace: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    phase, rate = 2 * math.pi * _phase(_NODS[pace], rng), _NOD_RATE[pace] * rng.uniform(0.85, 1.15)
    spin = np.stack([np.zeros(SAMPLES), rate * np.sin(phase), np.zeros(SAMPLES)])
    return 0.05 * rate * np.stack([np.cos(phase), np.zeros(SAMPLES), np.sin(phase)]), spin


_MOTIONS = {"walking": _walk, "jumping": _jump, "turning": _swivel, "nodding": _nod}


def _turn(about_x: float, about_y: float) -> np.ndarray:
    """Body to world, [3, 3]."""
    cx, sx, cy, sy = math.cos(about_x), math.sin(about_x), math.cos(about_y), math.sin(about_y)
    return np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]]) @ np.array(
        [[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]
    )


def render(attributes: Attributes, rng: np.random.Generator) -> RenderedMedia:
    """One motion sample."""
    out = io.BytesIO()
    np.save(out, make_trace(attributes, rng).astype(np.float32))
    return RenderedMedia({"imu.npy": out.getvalue()})
