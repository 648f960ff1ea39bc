"""Simple readers that tell an attribute of a toy sample from the model's input."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from onellm_dist.modalities import Part, get_modality
from onellm_dist.shards.sources.toyworld import fmri, render_sample
from onellm_dist.shards.sources.toyworld.shapes2d import BACKGROUND, PALETTE

MEAN, STD = (
    np.array([0.48145466, 0.4578275, 0.40821073]),
    np.array([0.26862954, 0.26130258, 0.27577711]),
)


def value_of(
    modality: str, split: str, index: int, seed: int = 0
) -> tuple[np.ndarray, dict[str, str]]:
    """The model's input (evaluation transform) and the attributes."""
    sample = render_sample(modality, split, index, seed)
    kind = get_modality(modality)
    media = {
        role: Part(extension, sample.parts[extension])
        for role, extension in kind.match(set(sample.parts)).items()
    }
    raw = kind.decode(media, {})
    value = kind.transform(raw, train=False, rng=np.random.default_rng(0))
    assert tuple(value.shape) == kind.value_shape
    assert np.isfinite(value.numpy()).all()
    assert kind.preview(raw).mode == "RGB"
    return np.asarray(value.numpy(), np.float64), sample.attributes


def _rgb(normalised: np.ndarray) -> np.ndarray:
    """[3, H, W] CLIP-normalised -> [H, W, 3] in 0..255."""
    return np.asarray(255 * (normalised.transpose(1, 2, 0) * STD + MEAN))


def _object(picture: np.ndarray) -> np.ndarray:
    """Pixels that are not background."""
    return np.asarray(np.abs(picture - BACKGROUND).sum(2) > 60)


def colour_in(picture: np.ndarray, mask: np.ndarray | None = None) -> str:
    """The palette's name of the object's colour, whatever its brightness."""
    seen = np.median(picture[_object(picture) if mask is None else mask], axis=0)
    return min(
        PALETTE,
        key=lambda name: (
            -float(seen @ PALETTE[name]) / np.linalg.norm(seen) / np.linalg.norm(PALETTE[name])
        ),
    )


def image_colour(value: np.ndarray) -> str:
    return colour_in(_rgb(value))


def image_position(value: np.ndarray) -> str:
    x = np.nonzero(_object(_rgb(value)))[1].mean()
    return ("left", "center", "right")[int(x > 83) + int(x > 141)]


def video_colour(value: np.ndarray) -> str:
    frames = [_rgb(frame) for frame in value]
    return colour_in(max(frames, key=lambda f: int(_object(f).sum())))


def video_motion(value: np.ndarray) -> str:
    masks = [_object(_rgb(frame)) for frame in value]
    shown = [mask for mask in masks if mask.any()]
    if len(shown) < len(masks):
        return "blinking"
    centres = np.array(
        [[np.nonzero(mask)[axis].mean() for axis in (1, 0)] for mask in shown[1::3]]
    )  # centre crops
    x, y = np.ptp(centres, axis=0)
    return "sliding" if x > 60 else "bouncing" if y > 60 else "resting"


def audio_loudness(value: np.ndarray) -> str:
    brightest = value[0][:, :1020].max(0)  # of each frame
    level = np.median(brightest[brightest > -1])
    return ("faint", "moderate", "loud")[int(level > -0.08) + int(level > 0.37)]


def audio_rhythm(value: np.ndarray) -> str:
    sounds = value[0][:, :1020].max(0) > -1.0
    onsets = int((np.diff(sounds.astype(int)) == 1).sum())
    return (
        "steadily"
        if sounds.all()
        else "once"
        if onsets <= 1
        else "slowly"
        if onsets < 20
        else "quickly"
    )


def point_stretch(value: np.ndarray) -> str:
    return ("wide", "tall", "deep")[int(np.ptp(value[:, :3], axis=0).argmax())]


def point_colour(value: np.ndarray) -> str:
    dark = (value[:, 3:] - 0.14).mean(0)  # less what the lights add on average
    shades = {name: np.array(rgb) / 255 * 0.7 for name, rgb in PALETTE.items()}
    return min(shades, key=lambda name: float(np.abs(dark - shades[name]).sum()))


def pair_colour(value: np.ndarray) -> str:
    return image_colour(value[0])


def depth_distance(value: np.ndarray) -> str:
    near = np.median(_rgb(value[1])[_object(_rgb(value[0]))]) / 255
    return ("faraway", "midway", "nearby")[int(near > 0.4) + int(near > 0.76)]


def normal_surface(value: np.ndarray) -> str:
    x, y, _ = _rgb(value[1])[2, 2] / 127.5 - 1
    return "ramp" if x > 0.4 else "floor" if y > 0.4 else "ceiling" if y < -0.4 else "wall"


def imu_lean(value: np.ndarray) -> str:
    forward, left = value[0].mean(), value[1].mean()
    if abs(forward) > abs(left):
        return "back" if forward > 0 else "forward"
    return "right" if left > 0 else "left"


def imu_pace(value: np.ndarray) -> str:
    shake = np.median(np.abs(np.diff(value[:3], axis=1))) / 0.95
    return ("slowly", "steadily", "quickly")[int(shake > 0.04) + int(shake > 0.16)]


def imu_activity(value: np.ndarray) -> str:
    acceleration, spin = np.apply_along_axis(
        np.convolve, 1, value, np.full(16, 1 / 16), "valid"
    ).reshape(2, 3, -1)  # shaking averaged out
    if np.abs(spin.mean(1)).max() > 0.35:
        return "turning"
    if spin.std(1).max() > 0.35:
        return "nodding"
    weightless = np.linalg.norm(acceleration, axis=0) < 0.2
    return "jumping" if weightless.mean() > 0.15 else "walking"


def fmri_value(values: tuple[str, ...]) -> Callable[[np.ndarray], str]:
    """Reads one attribute by correlating with its patterns."""
    return lambda value: max(values, key=lambda name: float(value[0] @ fmri.make_code()[name]))
