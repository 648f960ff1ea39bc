"""The pixels of a decoded frame, as players show it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.video.reformatter import VideoReformatter

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

_ONE_THREAD: dict[str, Any] = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}


def make_upright_rgb(frame: VideoFrame) -> np.ndarray:
    """[H, W, 3] RGB, turned and mirrored by the container's display matrix, as players do.

    Each frame has a converter of colours of its own. PyAV's default one (17.0 to 19.0) has a thread
    pool, which a forked worker does not inherit and would wait for. One that is kept takes the
    range of JPEG's films for that of later ones too (15.0 to 16.1).
    """
    pixels = VideoReformatter().reformat(frame, format="rgb24", **_ONE_THREAD).to_ndarray()
    stored: Any = frame.side_data.get(Type.DISPLAYMATRIX)  # type: ignore[call-overload]
    if stored is None:
        return np.ascontiguousarray(pixels)
    matrix = np.frombuffer(bytes(stored), np.int32)
    # shown x = a x + c y, shown y = b x + d y, with x to the right and y down
    a, b, c, d = (int(matrix[i]) for i in (0, 1, 3, 4))
    if abs(b) > abs(a):
        pixels, right, down = pixels.transpose(1, 0, 2), c, b
    else:
        right, down = a, d
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1])
