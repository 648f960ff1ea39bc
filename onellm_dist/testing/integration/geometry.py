"""Depth maps, normal maps and coloured points from measured disparity and organised point clouds.

An organised point cloud has one point per pixel. H and W are image rows and columns. The camera's
axes are x right, y down, z away from the camera, in metres.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class RgbdView:
    """A picture, and the 3-D point that each of its pixels shows.

    Attributes:
        rgb: [H, W, 3] uint8.
        points: [H, W, 3] fp32, metres; NaN for pixels without a measurement.
    """

    rgb: np.ndarray
    points: np.ndarray

    def crop(self, left: int, top: int, right: int, bottom: int) -> RgbdView:
        """The part of the view in a box of pixels."""
        return RgbdView(self.rgb[top:bottom, left:right], self.points[top:bottom, left:right])


@dataclass(frozen=True)
class StereoCamera:
    """A rectified stereo pair.

    Attributes:
        focal: focal length in pixels.
        cx: column of the principal point.
        cy: row of the principal point.
        doffs: cx of the right camera minus cx of the left one.
        baseline: metres between the cameras.
    """

    focal: float
    cx: float
    cy: float
    doffs: float
    baseline: float


def make_disparity_view(rgb: np.ndarray, disparity: np.ndarray, camera: StereoCamera) -> RgbdView:
    """Compute the points of a stereo view: z = baseline * focal / (disparity + doffs).

    The formula is that of Middlebury 2014's calibration notes.

    Args:
        rgb: [H, W, 3] uint8, the left picture.
        disparity: [H, W] pixels; NaN or infinite where unknown.
        camera: calibration of the stereo pair.
    """
    rows, columns = np.indices(disparity.shape, dtype=np.float32)
    known = np.isfinite(disparity) & (disparity + camera.doffs > 0)
    z = np.full(disparity.shape, np.nan, np.float32)
    z[known] = camera.baseline * camera.focal / (disparity[known] + camera.doffs)
    points = np.stack(
        [(columns - camera.cx) * z / camera.focal, (rows - camera.cy) * z / camera.focal, z], -1
    )
    return RgbdView(rgb, points.astype(np.float32))


def read_pcd_view(data: bytes) -> RgbdView:
    """Read an organised PCD file as a view.

    Args:
        data: a binary_compressed PCD with fields x y z rgba, y up and z towards the viewer.

    Raises:
        ValueError: `data` is not such a file.
    """
    header, columns = read_pcd(data)
    width, height = int(header["WIDTH"][0]), int(header["HEIGHT"][0])
    colour = columns["rgba"].view("<u4")
    rgb = np.stack([colour >> 16 & 255, colour >> 8 & 255, colour & 255], -1).astype(np.uint8)
    points = np.stack([columns["x"], -columns["y"], -columns["z"]], -1).astype(np.float32)
    return RgbdView(rgb.reshape(height, width, 3), points.reshape(height, width, 3))


def read_pcd(data: bytes) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
    """Read header and columns of a binary_compressed PCD file.

    PCL's file format 0.7 compresses the columns by LZF, one field after the other.

    Raises:
        ValueError: `data` is not such a file.
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
    plain = decompress_lzf(body[8 : 8 + packed], size)
    count, at, columns = int(header["POINTS"][0]), 0, {}
    for name, width, kind in zip(header["FIELDS"], header["SIZE"], header["TYPE"], strict=True):
        columns[name] = np.frombuffer(
            plain, {"F": "<f", "U": "<u", "I": "<i"}[kind] + width, count, at
        )
        at += count * int(width)
    return header, columns


def decompress_lzf(data: bytes, size: int) -> bytes:
    """Decompress LZF (liblzf's format).

    A control byte below 32 starts a run of literal bytes, any other a copy of earlier output.

    Args:
        data: the compressed bytes.
        size: length of the result.

    Raises:
        ValueError: `data` does not decompress to `size` bytes.
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
            span = len(out) - start  # a copy may reach into its own output: repeat the span then
            out += (
                (out[start:] * (length // span + 1))[:length]
                if span < length
                else out[start : start + length]
            )
    except IndexError:
        raise ValueError("LZF data ends inside a copy") from None
    if len(out) != size:
        raise ValueError(f"LZF data decompresses to {len(out)} bytes instead of {size}")
    return bytes(out)


def draw_depth(view: RgbdView) -> Image.Image:
    """Draw inverse depth with 8 bits; near is bright, as in DPT's maps, which the paper uses.

    The nearest and the farthest percent are clipped. Pixels without a measurement are 0.
    """
    z = view.points[..., 2]
    known = np.isfinite(z) & (z > 0)
    inverse = np.zeros(z.shape, np.float32)
    inverse[known] = 1.0 / z[known]
    low, high = np.percentile(inverse[known], [1, 99])
    scaled = 1 + 254 * np.clip((inverse - low) / max(high - low, 1e-9), 0, 1)
    return Image.fromarray(np.where(known, scaled, 0).astype(np.uint8), "L")


def draw_normals(view: RgbdView, reach: int = 4) -> Image.Image:
    """Draw surface normals as colours: (n + 1) / 2 * 255 with x right, y up, z towards the viewer.

    Pixels without a measurement are grey.

    Args:
        view: the measured view.
        reach: a normal is the cross product of point differences over so many pixels to each side.
    """
    p = view.points
    across = np.full_like(p, np.nan)
    down = np.full_like(p, np.nan)
    across[:, reach:-reach] = p[:, 2 * reach :] - p[:, : -2 * reach]
    down[reach:-reach] = p[2 * reach :] - p[: -2 * reach]
    normal = np.cross(across, down)  # right x down points away from the viewer
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-12)
    # Negated, then y flipped to up and z to nearer.
    towards = np.stack([-normal[..., 0], normal[..., 1], normal[..., 2]], -1)
    colour = np.where(np.isfinite(towards), np.rint((towards + 1) * 127.5), 128)
    return Image.fromarray(colour.astype(np.uint8), "RGB")


def sample_coloured_points(view: RgbdView, count: int, seed: int = 0) -> np.ndarray:
    """Draw measured points of a view uniformly.

    Args:
        view: the measured view.
        count: number of points; some come twice if the view has fewer.
        seed: seed of the draw.

    Returns:
        [count, 6] fp32: xyz in metres, rgb in [0, 1].
    """
    known = np.isfinite(view.points).all(-1)
    table = np.concatenate([view.points[known], view.rgb[known] / np.float32(255)], -1).astype(
        np.float32
    )
    rng = np.random.default_rng(seed)
    return table[rng.choice(len(table), count, replace=len(table) < count)]


def encode_png(image: Image.Image) -> bytes:
    """Encode a picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
