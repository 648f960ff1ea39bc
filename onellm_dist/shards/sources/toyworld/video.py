"""Toy videos (`mp4`, H.264, 168 x 144, 3 seconds at 4 frames per second): one moving flat shape.

It slides, bounces, blinks or rests. The model sees the frames at 0, 0.5, 1, 1.5 and 2 seconds (5
clips of a second, the first frame of each), in three crops of 144 x 144. A motion runs along its
complete path in those 2 seconds and stays inside all three crops.
"""

from __future__ import annotations

import io
import math
from fractions import Fraction

import av
import numpy as np

from onellm_dist.shards.sources.toyworld.draws import RenderedMedia
from onellm_dist.shards.sources.toyworld.shapes2d import BACKGROUND, paint_shape, vary_colour
from onellm_dist.shards.sources.toyworld.world import Attributes

WIDTH = 168
HEIGHT = 144
FRAMES_PER_SECOND = 4
SECONDS = 3
_SWEEP_SECONDS = 2.0
_BLINK_SECONDS = 0.5
_SWAY = 34.0
"""Half the length of a horizontal path in pixels."""
_HEAVE = 40.0
"""Half the length of a vertical path in pixels."""


def draw_frames(attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
    """Draw the frames, [12, 144, 168, 3] uint8."""
    motion, shape = attributes["motion"], attributes["shape"]
    colour = vary_colour(attributes["color"], rng)
    angle = rng.uniform(-15, 15)
    radius = rng.uniform(18, 22)
    centre = np.array([WIDTH / 2, HEIGHT / 2]) + rng.uniform(-4, 4, size=2)
    direction, first_dark = rng.choice((-1, 1)), int(rng.integers(2))
    film = np.empty((FRAMES_PER_SECOND * SECONDS, HEIGHT, WIDTH, 3), dtype=np.uint8)
    film[:] = BACKGROUND
    for number, frame in enumerate(film):
        seconds = number / FRAMES_PER_SECOND
        if motion == "blinking" and (math.floor(seconds / _BLINK_SECONDS) + first_dark) % 2:
            continue
        # -1 at 0 s, 1 at 2 s, and back.
        swing = direction * (1 - abs((seconds / _SWEEP_SECONDS) % 2 - 1) * 2)
        paths = {"sliding": (_SWAY * swing, 0.0), "bouncing": (0.0, _HEAVE * swing)}
        offset = paths.get(motion, (0.0, 0.0))
        paint_shape(
            frame,
            shape,
            centre=(centre[0] + offset[0], centre[1] + offset[1]),
            radius=radius,
            angle=angle,
            colour=colour,
        )
    return film


def encode_mp4(film: np.ndarray, rate: int) -> bytes:
    """Encode [T, H, W, 3] uint8 as an H.264 mp4; equal frames give equal bytes.

    For that, it uses one thread, no time of day, and neither B-frames nor lookahead: with them,
    x264 in PyAV 18.1 gave other bytes for one video in a hundred when the process was restarted.
    """
    out = io.BytesIO()
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(
            "libx264",
            rate=rate,
            options={"preset": "veryfast", "tune": "zerolatency", "crf": "18", "threads": "1"},
        )
        stream.width = film.shape[2]
        stream.height = film.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, rate)
        for number, picture in enumerate(film):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def render(attributes: Attributes, rng: np.random.Generator) -> RenderedMedia:
    """Render a video sample."""
    return RenderedMedia({"mp4": encode_mp4(draw_frames(attributes, rng), FRAMES_PER_SECOND)})
