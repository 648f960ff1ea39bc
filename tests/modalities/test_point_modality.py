"""Point clouds: file formats, colours, sizes, normalisation."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_samples import npy
from safetensors.torch import load_file

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.io.clouds import _decompress_lzf

PARITY = load_file(Path(__file__).parents[1] / "fixtures/parity_preprocess/preprocess.safetensors")
POINT = get_modality("point")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def cloud(points: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """[N, 3] fp32 positions and [N, 3] uint8 colours."""
    return rng(points).normal(size=(points, 3)).astype(np.float32), rng(1).integers(
        0, 256, (points, 3)
    ).astype(np.uint8)


def decode(data: bytes | Part, extension: str = "ply") -> np.ndarray:
    part = data if isinstance(data, Part) else Part(extension, data)
    points: np.ndarray = POINT.decode({"point": part}, {})
    return points


def check(got: np.ndarray, xyz: np.ndarray, colours: np.ndarray) -> None:
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[:, :3], xyz, atol=1e-5)
    np.testing.assert_allclose(got[:, 3:], colours / 255, atol=1e-6)


def test_the_normalisation_is_the_references() -> None:
    raw = decode(npy(PARITY["point.raw"].numpy()))
    for train in (True, False):
        got = POINT.transform(raw, train=train, rng=rng())
        torch.testing.assert_close(got, PARITY["point.norm"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", [1, 255])
@pytest.mark.parametrize("kind", ["<f4", "<f8"])
def test_npy(transposed: bool, scale: int, kind: str) -> None:
    xyz, colours = cloud()
    table = np.concatenate([xyz, colours / 255 * scale], 1).astype(kind)
    check(decode(npy(table.T if transposed else table)), xyz, colours)


def ply(
    xyz: np.ndarray,
    colours: np.ndarray,
    layout: str,
    names: tuple[str, ...] = ("red", "green", "blue"),
    end: str = "\n",
) -> bytes:
    """With an extra property before the colours, and faces behind the vertices, as meshes have."""
    head = ["ply", f"format {layout} 1.0", "comment a test", f"element vertex {len(xyz)}"]
    head += (
        [f"property float {n}" for n in "xyz"]
        + ["property double quality"]
        + [f"property uchar {n}" for n in names]
    )
    head += ["element face 1", "property list uchar int vertex_indices", "end_header", ""]
    if layout == "ascii":
        rows = [
            f"{x} {y} {z} 0.5 {r} {g} {b}"
            for (x, y, z), (r, g, b) in zip(xyz, colours, strict=True)
        ]
        return end.join(head).encode() + "\n".join([*rows, "3 0 1 2"]).encode()
    order = "<" if "little" in layout else ">"
    body = b"".join(
        struct.pack(order + "fffdBBB", *map(float, p), 0.5, *map(int, c))
        for p, c in zip(xyz, colours, strict=True)
    )
    return end.join(head).encode() + body + struct.pack(order + "Biii", 3, 0, 1, 2)


@pytest.mark.parametrize("layout", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize(
    "names",
    [("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue")],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_ply(layout: str, names: tuple[str, ...], end: str) -> None:
    xyz, colours = cloud()
    check(decode(ply(xyz, colours, layout, names, end)), xyz, colours)


def test_a_ply_without_a_format_is_unreadable() -> None:
    with pytest.raises(SampleError, match="its header has no line 'format'"):
        decode(b"ply\nelement vertex 1\nproperty float x\nend_header\n1\n")


def test_ply_as_trimesh_writes_it() -> None:
    trimesh = pytest.importorskip("trimesh")
    xyz, colours = cloud()
    for encoding in ("binary", "ascii"):
        made = trimesh.PointCloud(xyz, colors=colours).export(file_type="ply", encoding=encoding)
        check(decode(made if isinstance(made, bytes) else made.encode()), xyz, colours)


def lzf_literals(data: bytes) -> bytes:
    """Valid LZF without a single copy."""
    return b"".join(
        bytes([len(data[i : i + 32]) - 1]) + data[i : i + 32] for i in range(0, len(data), 32)
    )


def pcd(xyz: np.ndarray, colours: np.ndarray, encoding: str, kind: str = "F") -> bytes:
    packed = (colours.astype(np.uint32) << np.array([16, 8, 0], np.uint32)).sum(1).astype("<u4")
    head = (
        "# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\n"
        "FIELDS x y z _ rgb\nSIZE 4 4 4 1 4\n"
        f"TYPE F F F U {kind}\nCOUNT 1 1 1 4 1\n"
        f"WIDTH {len(xyz)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(xyz)}\nDATA {encoding}\n"
    ).encode()
    if encoding == "ascii":
        shown = [np.array([p], "<u4").view("<f4")[0] if kind == "F" else p for p in packed]
        return (
            head
            + "\n".join(
                f"{x!r} {y!r} {z!r} 0 0 0 0 {c!r}"
                for (x, y, z), c in zip(xyz.tolist(), np.array(shown).tolist(), strict=True)
            ).encode()
        )
    columns = [*xyz.T.astype("<f4"), np.zeros((len(xyz), 4), np.uint8), packed]
    if encoding == "binary":
        rows = zip(
            *(
                c.reshape(len(xyz), -1).view(np.uint8).reshape(len(xyz), -1)
                for c in map(np.ascontiguousarray, columns)
            ),
            strict=True,
        )
        return head + b"".join(part.tobytes() for row in rows for part in row)
    plain = b"".join(np.ascontiguousarray(c).tobytes() for c in columns)
    body = lzf_literals(plain)
    return head + struct.pack("<II", len(body), len(plain)) + body


@pytest.mark.parametrize("encoding", ["ascii", "binary", "binary_compressed"])
@pytest.mark.parametrize("kind", ["F", "U"])
def test_pcd(encoding: str, kind: str) -> None:
    xyz, colours = cloud()
    colours[:, 0] &= 0x7F  # bits of a float NaN do not survive text
    check(decode(pcd(xyz, colours, encoding, kind), "pcd"), xyz, colours)


def test_pcd_points_without_a_return_are_left_out() -> None:
    xyz, colours = cloud()
    xyz[::3] = np.nan
    check(
        decode(pcd(xyz, colours, "binary"), "pcd"),
        xyz[np.isfinite(xyz[:, 0])],
        colours[np.isfinite(xyz[:, 0])],
    )


def lzf_reference(packed: bytes) -> bytes:
    """LZF one byte at a time."""
    out, i = bytearray(), 0
    while i < len(packed):
        control, i = packed[i], i + 1
        if control < 32:
            out += packed[i : i + control + 1]
            i += control + 1
        else:
            length = control >> 5
            if length == 7:
                length, i = length + packed[i], i + 1
            back, i = ((control & 31) << 8) + packed[i] + 1, i + 1
            for _ in range(length + 2):
                out.append(out[-back])
    return bytes(out)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.binary(min_size=1, max_size=32), st.tuples(st.integers(3, 264), st.integers(1, 60))
        ),
        min_size=1,
        max_size=20,
    )
)
def test_lzf_copies_overlap_and_reach_back(tokens: list[bytes | tuple[int, int]]) -> None:
    packed, size = bytearray(), 0
    for token in tokens:
        if isinstance(token, bytes) or size == 0:
            literal = token if isinstance(token, bytes) else b"z"
            packed += bytes([len(literal) - 1]) + literal
            size += len(literal)
        else:
            length, back = token[0], min(token[1], size) - 1
            packed += (
                bytes([(length - 2) << 5 | back >> 8])
                if length <= 8
                else bytes([7 << 5 | back >> 8, length - 9])
            )
            packed.append(back & 255)
            size += length
    assert _decompress_lzf(bytes(packed), size) == lzf_reference(bytes(packed))


XYZ, COLOURS = cloud()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"ply\n",
        b"ply\nformat ascii 1.0\nelement vertex 2\nproperty float x\nend_header\n1\n",
        b"ply\nformat magic 1.0\nelement vertex 0\nend_header\n",
        ply(XYZ, COLOURS, "binary_little_endian")[:-500],
        ply(XYZ, COLOURS, "ascii").replace(b"uchar red", b"uchar rot"),
        ply(np.full_like(XYZ, np.inf), COLOURS, "binary_little_endian"),
        pcd(XYZ, COLOURS, "binary")[:-30],
        pcd(XYZ, COLOURS, "binary_compressed")[:-30],
        pcd(XYZ, COLOURS, "binary").replace(b"DATA binary", b"DATA secret"),
        npy(np.zeros((100, 3))).data,
        npy(np.zeros((100, 8))).data,
        npy(np.full((100, 6), np.nan)).data,
        npy(np.full((100, 6), 300)).data,
        npy(np.full((100, 6), -1)).data,
        b"\x80\x04pickle",
    ],
)
def test_bad_files_are_refused(data: bytes) -> None:
    with pytest.raises(SampleError) as error:
        decode(data, "ply")
    assert ".ply" in error.value.what and error.value.why and error.value.do


@settings(max_examples=40, deadline=None)
@given(st.integers(32, 20000), st.booleans(), st.integers(0, 2**32 - 1))
def test_every_size_becomes_8192_of_its_own_points(points: int, train: bool, seed: int) -> None:
    raw = rng(seed).random((points, 6)).astype(np.float32)
    raw[:, 3] = np.arange(points) / points
    got = POINT.transform(raw, train=train, rng=rng(seed)).numpy()
    assert got.shape == (8192, 6)
    assert np.linalg.norm(got[:, :3], axis=1).max() == pytest.approx(1, abs=1e-5)
    which = np.round(got[:, 3] * points).astype(int)
    counts = np.bincount(which, minlength=points)
    np.testing.assert_array_equal(got[:, 3:], raw[which, 3:])
    if points <= 8192:
        assert counts.min() >= 1
    else:
        assert counts.max() == 1
    if not train and points <= 8192:
        assert counts.max() - counts.min() <= 1


def test_resampling_in_eval_draws_nothing_and_in_training_follows_the_generator() -> None:
    raw = rng(2).random((9000, 6)).astype(np.float32)
    assert torch.equal(
        POINT.transform(raw, train=False, rng=rng(1)), POINT.transform(raw, train=False, rng=rng(2))
    )
    assert torch.equal(
        POINT.transform(raw, train=True, rng=rng(1)), POINT.transform(raw, train=True, rng=rng(1))
    )
    assert not torch.equal(
        POINT.transform(raw, train=True, rng=rng(1)), POINT.transform(raw, train=True, rng=rng(2))
    )


@pytest.mark.parametrize(
    "raw",
    [
        np.zeros((31, 6), np.float32),
        np.ones((8192, 6), np.float32),
        np.full((8192, 6), 3e38, np.float32)
        * np.sign(rng().normal(size=(8192, 6))).astype(np.float32),
    ],
)
def test_clouds_without_extent_are_refused(raw: np.ndarray) -> None:
    with pytest.raises(SampleError):
        POINT.transform(raw, train=False, rng=rng())
