"""Depth, normals and coloured points from real disparity and from organised (pixel by pixel) point clouds.

H, W image rows and columns. Camera axes here: x right, y down, z away from the camera, metres.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class RgbdView:
    """A picture and the 3-D point that each of its pixels shows.

    Attributes:
        rgb: [H, W, 3] uint8.
        points: [H, W, 3] fp32 metres; NaN where the sensor gave nothing.
    """

    rgb: np.ndarray
    points: np.ndarray

    def crop(self, left: int, top: int, right: int, bottom: int) -> RgbdView:
        """The view's pixels in a box."""
        return RgbdView(self.rgb[top:bottom, left:right], self.points[top:bottom, left:right])


@dataclass(frozen=True)
class StereoCamera:
    """A rectified stereo pair: focal length and principal point in pixels, baseline in metres, `doffs` = cx right - cx left."""

    focal: float
    cx: float
    cy: float
    doffs: float
    baseline: float


def view_from_disparity(rgb: np.ndarray, disparity: np.ndarray, camera: StereoCamera) -> RgbdView:
    """Points of a stereo view: z = baseline * focal / (disparity + doffs) (Middlebury 2014's calibration notes).

    Args:
        rgb: [H, W, 3] uint8, the left picture.
        disparity: [H, W] pixels; NaN or infinite where unknown.
    """
    rows, columns = np.indices(disparity.shape, dtype=np.float32)
    known = np.isfinite(disparity) & (disparity + camera.doffs > 0)
    z = np.full(disparity.shape, np.nan, np.float32)
    z[known] = camera.baseline * camera.focal / (disparity[known] + camera.doffs)
    points = np.stack(
        [(columns - camera.cx) * z / camera.focal, (rows - camera.cy) * z / camera.focal, z], -1
    )
    return RgbdView(rgb, points.astype(np.float32))


def view_from_pcd(data: bytes) -> RgbdView:
    """An organised PCD (binary_compressed, fields x y z rgba, y up and z towards the viewer) as a view.

    Raises:
        ValueError: not such a file.
    """
    header, columns = read_pcd(data)
    width, height = int(header["WIDTH"][0]), int(header["HEIGHT"][0])
    colour = columns["rgba"].view("<u4")
    rgb = np.stack([colour >> 16 & 255, colour >> 8 & 255, colour & 255], -1).astype(np.uint8)
    points = np.stack([columns["x"], -columns["y"], -columns["z"]], -1).astype(np.float32)
    return RgbdView(rgb.reshape(height, width, 3), points.reshape(height, width, 3))


def read_pcd(data: bytes) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
    """Header and columns of a binary_compressed PCD (PCL's file format 0.7: LZF over columns, one field after the other).

    Raises:
        ValueError: not such a file.
    """
    head, mark, body = data.partition(b"DATA binary_compressed\n")
    if not mark:
        raise ValueError("not a binary_compressed PCD file")
    header = {
        line.split()[0]: line.split()[1:]
        for line in head.decode("ascii").splitlines()
        if line and line[0] != "#"
    }
    packed, size = (int(v) for v in np.frombuffer(body[:8], "<u4"))
    plain = lzf_decompress(body[8 : 8 + packed], size)
    count, at, columns = int(header["POINTS"][0]), 0, {}
    for name, width, kind in zip(header["FIELDS"], header["SIZE"], header["TYPE"], strict=True):
        columns[name] = np.frombuffer(
            plain, {"F": "<f", "U": "<u", "I": "<i"}[kind] + width, count, at
        )
        at += count * int(width)
    return header, columns


def lzf_decompress(data: bytes, size: int) -> bytes:
    """LZF (liblzf's format): a control byte below 32 starts a literal run, any other a copy of earlier output.

    Raises:
        ValueError: the data does not unpack to `size` bytes.
    """
    out, i = bytearray(), 0
    try:
        while i < len(data):
            control = data[i]
            i += 1
            if control < 32:
                out += data[i : i + control + 1]
                i += control + 1
                continue
            length = control >> 5
            if length == 7:
                length += data[i]
                i += 1
            start = len(out) - ((control & 31) << 8 | data[i]) - 1
            i += 1
            if start < 0:
                raise ValueError("LZF copy from before the start")
            length += 2
            span = len(out) - start  # a copy may reach into what it writes: repeat the span then
            out += (
                (out[start:] * (length // span + 1))[:length]
                if span < length
                else out[start : start + length]
            )
    except IndexError:
        raise ValueError("LZF data ends inside a copy") from None
    if len(out) != size:
        raise ValueError(f"LZF data unpacks to {len(out)} bytes, {size} were announced")
    return bytes(out)


def depth_image(view: RgbdView) -> Image.Image:
    """Inverse depth as 8 bits, near is bright (as DPT's maps, which the paper uses); unmeasured pixels are 0.

    The nearest and farthest percent are clipped.
    """
    z = view.points[..., 2]
    known = np.isfinite(z) & (z > 0)
    inverse = np.zeros(z.shape, np.float32)
    inverse[known] = 1.0 / z[known]
    low, high = np.percentile(inverse[known], [1, 99])
    scaled = 1 + 254 * np.clip((inverse - low) / max(high - low, 1e-9), 0, 1)
    return Image.fromarray(np.where(known, scaled, 0).astype(np.uint8), "L")


def normal_image(view: RgbdView, reach: int = 4) -> Image.Image:
    """Surface normals as colours, (n + 1) / 2 * 255 with x right, y up, z towards the viewer; unmeasured pixels are grey.

    A pixel's normal is the cross product of the point differences over `reach` pixels to each side.
    """
    p = view.points
    across, down = np.full_like(p, np.nan), np.full_like(p, np.nan)
    across[:, reach:-reach] = p[:, 2 * reach :] - p[:, : -2 * reach]
    down[reach:-reach] = p[2 * reach :] - p[: -2 * reach]
    normal = np.cross(across, down)  # right x down points away from the viewer
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
    towards = np.stack(
        [-normal[..., 0], normal[..., 1], normal[..., 2]], -1
    )  # negated, then y and z flipped to up and nearer
    colour = np.where(np.isfinite(towards), np.rint((towards + 1) * 127.5), 128)
    return Image.fromarray(colour.astype(np.uint8), "RGB")


def coloured_points(view: RgbdView, count: int, seed: int = 0) -> np.ndarray:
    """`count` of the view's measured points, drawn evenly: [count, 6] fp32, xyz in metres and rgb in [0, 1]."""
    known = np.isfinite(view.points).all(-1)
    table = np.concatenate([view.points[known], view.rgb[known] / np.float32(255)], -1).astype(
        np.float32
    )
    rng = np.random.default_rng(seed)
    return table[rng.choice(len(table), count, replace=len(table) < count)]


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
