"""Depth, normals and clouds of surfaces whose result is known."""

from __future__ import annotations

import numpy as np
import pytest

from onellm_dist.testing.integration import geometry

CAMERA = geometry.StereoCamera(focal=100.0, cx=32.0, cy=24.0, doffs=5.0, baseline=0.2)


def make_plane_view(normal: tuple[float, float, float], distance: float = 2.0) -> geometry.RgbdView:
    """A view of the plane normal . p = distance (camera axes: x right, y down, z away)."""
    rows, columns = np.indices((48, 64), dtype=np.float64)
    rays = np.stack(
        [
            (columns - CAMERA.cx) / CAMERA.focal,
            (rows - CAMERA.cy) / CAMERA.focal,
            np.ones_like(rows),
        ],
        -1,
    )
    z = distance / (rays @ np.array(normal))
    disparity = (CAMERA.baseline * CAMERA.focal / z - CAMERA.doffs).astype(np.float32)
    rgb = np.full((48, 64, 3), (255, 128, 0), np.uint8)
    return geometry.make_disparity_view(rgb, disparity, CAMERA)


def test_disparity_gives_the_points_of_the_plane() -> None:
    normal = (0.0, 0.6, 0.8)
    view = make_plane_view(normal)
    np.testing.assert_allclose(view.points @ np.array(normal), 2.0, rtol=1e-4)


def test_unknown_disparity_is_unknown_depth_and_black() -> None:
    disparity = np.full((48, 64), 10.0, np.float32)
    disparity[:, :32] = 20.0
    disparity[0, 0], disparity[0, 1] = np.nan, np.inf
    view = geometry.make_disparity_view(np.zeros((48, 64, 3), np.uint8), disparity, CAMERA)
    assert np.isnan(view.points[0, :2]).all() and np.isfinite(view.points[1:]).all()
    depth = np.asarray(geometry.draw_depth(view))
    assert (depth[0, :2] == 0).all() and (depth[1:] > 0).all()
    assert depth[5, 5] > depth[5, 60], "near is bright"


@pytest.mark.parametrize(
    ("normal", "colour"),
    [
        ((0.0, 0.0, 1.0), (128, 128, 255)),  # a wall before the camera: towards the viewer
        ((0.0, 0.8, 0.6), (128, 230, 204)),  # a floor: its upper side shows
        ((0.6, 0.0, 0.8), (51, 128, 230)),  # a wall on the right: it faces left
    ],
)
def test_normals_of_planes_have_their_colours(
    normal: tuple[float, float, float], colour: tuple[int, int, int]
) -> None:
    picture = np.asarray(geometry.draw_normals(make_plane_view(normal))).astype(int)
    assert np.abs(picture[8:-8, 8:-8] - np.array(colour)).max() <= 2
    assert (picture[0] == 128).all(), "no neighbours on one side: grey"


def test_coloured_points_come_from_measured_pixels_only() -> None:
    view = make_plane_view((0.0, 0.0, 1.0))
    view.points[:, :40] = np.nan
    cloud = geometry.sample_coloured_points(view, 500)
    assert cloud.shape == (500, 6) and cloud.dtype == np.float32
    np.testing.assert_allclose(cloud[:, 2], 2.0, rtol=1e-5)
    assert (cloud[:, 0] > 0.15).all(), "columns below 40 are unknown"
    np.testing.assert_allclose(cloud[:, 3:], np.tile([1, 128 / 255, 0], (500, 1)), rtol=1e-6)
    assert len(np.unique(cloud[:, :2], axis=0)) == 500, (
        "no point is drawn twice if there are enough"
    )


def encode_literals(data: bytes) -> bytes:
    return b"".join(
        bytes([len(data[i : i + 32]) - 1]) + data[i : i + 32] for i in range(0, len(data), 32)
    )


def test_lzf_unpacks_literals_and_overlapping_copies() -> None:
    plain = bytes(range(100))
    assert geometry.decompress_lzf(encode_literals(plain), 100) == plain
    data = b"\x01ab" + bytes([(7 << 5) | 0, 3, 1])  # "ab", then 7 + 3 + 2 = 12 bytes from 2 back
    assert geometry.decompress_lzf(data, 14) == b"ab" * 7
    for broken, size in ((data[:-1], 14), (data, 13), (bytes([1 << 5, 0]), 3)):
        with pytest.raises(ValueError, match="LZF"):
            geometry.decompress_lzf(broken, size)


def test_an_organised_pcd_is_a_view_with_y_and_z_turned() -> None:
    points = np.arange(18, dtype="<f4").reshape(6, 3)
    colour = np.array([0xFF0000, 0x00FF00, 0x0000FF, 0, 0xFFFFFF, 0x102030], "<u4")
    body = points.T.tobytes() + colour.tobytes()
    packed = encode_literals(body)
    header = (
        "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z rgba\nSIZE 4 4 4 4\nTYPE F F F U\n"
        "COUNT 1 1 1 1\nWIDTH 3\nHEIGHT 2\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS 6\n"
        "DATA binary_compressed\n"
    )
    data = header.encode() + np.array([len(packed), len(body)], "<u4").tobytes() + packed
    view = geometry.read_pcd_view(data)
    assert view.rgb.shape == (2, 3, 3) and view.rgb[1, 2].tolist() == [16, 32, 48]
    np.testing.assert_array_equal(view.points.reshape(6, 3), points * [1, -1, -1])
    with pytest.raises(ValueError, match="binary_compressed"):
        geometry.read_pcd_view(b"DATA ascii\n1 2 3\n")
