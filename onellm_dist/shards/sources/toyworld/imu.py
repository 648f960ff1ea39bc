"""Toy motions (`imu.npy`, [6, 400] fp32 at 200 Hz): what a head-worn sensor reads.

The channels are acceleration x, y, z in g and angular rate x, y, z in rad/s; x points forward, y
left, z up. The lean tilts the sensor against gravity, the activity moves it, and the pace sets rate
and force.
"""

from __future__ import annotations

import io
import math

import numpy as np

from onellm_dist.shards.sources.toyworld.draws import RenderedMedia
from onellm_dist.shards.sources.toyworld.world import Attributes

RATE = 200
SAMPLES = 400
_LEAN = {"left": (-1, 0), "right": (1, 0), "forward": (0, 1), "back": (0, -1)}
"""Rotation about x and about y, in units of the lean's angle."""
_PACE = {"slowly": 0, "steadily": 1, "quickly": 2}
_STEPS = (1.1, 1.9, 3.0)
_STEP_FORCE = (0.18, 0.38, 0.75)
_JUMPS = (0.9, 1.5, 2.3)
_JUMP_FORCE = (0.9, 1.6, 2.6)
_TURN_RATE = (0.6, 1.5, 3.2)
_NODS = (0.8, 1.5, 2.6)
_NOD_RATE = (0.6, 1.4, 2.8)
"""By pace: cycles per second, force in g, angular rate in rad/s."""
_SHAKE = (0.02, 0.09, 0.28)
"""By pace: how much the sensor shakes, in g, and half as much in rad/s.

It is the only sign of the pace that all activities share."""


def make_trace(attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
    """Make the motion, [6, 400] fp64."""
    pace = _PACE[attributes["pace"]]
    acceleration, spin = _MOTIONS[attributes["activity"]](pace, rng)
    acceleration[2] += 1.0  # at rest the sensor reads gravity, upwards
    about_x, about_y = (
        part * math.radians(rng.uniform(25, 35)) for part in _LEAN[attributes["lean"]]
    )
    tilt = _make_tilt(about_x, about_y)
    signals = np.concatenate([tilt.T @ acceleration, tilt.T @ spin])
    shake = _SHAKE[pace] * rng.uniform(0.8, 1.2) * np.array([1.0, 1.0, 1.0, 0.5, 0.5, 0.5])
    return np.asarray(signals + shake[:, None] * rng.normal(size=signals.shape))


def _make_phase(rate: float, rng: np.random.Generator) -> np.ndarray:
    """A phase that runs at about `rate` cycles per second, [400] in cycles."""
    return np.arange(SAMPLES) / RATE * rate * rng.uniform(0.9, 1.1) + rng.uniform()


def _walk(pace: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    phase = 2 * math.pi * _make_phase(_STEPS[pace], rng)
    force = _STEP_FORCE[pace] * rng.uniform(0.85, 1.15)
    acceleration = force * np.stack(
        [0.3 * np.sin(phase + 1), 0.4 * np.sin(phase / 2), np.sin(phase) + 0.3 * np.sin(2 * phase)]
    )
    spin = force * np.stack([0.5 * np.sin(phase / 2), 0.2 * np.sin(phase), 0.3 * np.cos(phase / 2)])
    return acceleration, spin


def _jump(pace: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    phase, force = _make_phase(_JUMPS[pace], rng) % 1, _JUMP_FORCE[pace] * rng.uniform(0.85, 1.15)
    in_air = phase < 0.45
    push = np.where(in_air, -1.0, force * np.sin(math.pi * (phase - 0.45) / 0.55))
    acceleration = np.stack([0.1 * push, np.zeros(SAMPLES), push])
    return acceleration, np.stack([np.zeros(SAMPLES), 0.15 * push, np.zeros(SAMPLES)])


def _swivel(pace: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    rate = _TURN_RATE[pace] * rng.uniform(0.85, 1.15) * rng.choice((-1, 1))
    wobble = 1 + 0.1 * np.sin(2 * math.pi * _make_phase(0.7, rng))
    spin = np.stack([np.zeros(SAMPLES), np.zeros(SAMPLES), rate * wobble])
    return np.stack([np.full(SAMPLES, -0.02 * rate**2), np.zeros(SAMPLES), np.zeros(SAMPLES)]), spin


def _nod(pace: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    phase, rate = (
        2 * math.pi * _make_phase(_NODS[pace], rng),
        _NOD_RATE[pace] * rng.uniform(0.85, 1.15),
    )
    spin = np.stack([np.zeros(SAMPLES), rate * np.sin(phase), np.zeros(SAMPLES)])
    return 0.05 * rate * np.stack([np.cos(phase), np.zeros(SAMPLES), np.sin(phase)]), spin


_MOTIONS = {"walking": _walk, "jumping": _jump, "turning": _swivel, "nodding": _nod}


def _make_tilt(about_x: float, about_y: float) -> np.ndarray:
    """Rotation matrix from body to world, [3, 3]."""
    cx, sx, cy, sy = math.cos(about_x), math.sin(about_x), math.cos(about_y), math.sin(about_y)
    rotation_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    return np.asarray(rotation_x @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]]))


def render(attributes: Attributes, rng: np.random.Generator) -> RenderedMedia:
    """Render a motion sample."""
    out = io.BytesIO()
    np.save(out, make_trace(attributes, rng).astype(np.float32))
    return RenderedMedia({"imu.npy": out.getvalue()})
