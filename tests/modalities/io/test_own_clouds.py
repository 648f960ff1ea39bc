"""Point clouds and responses as people have them: layouts, units, values that cannot be."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_samples import npy
from signal_mutations import cloud, pcd, ply

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.io.damage import collect_damage

POINT, FMRI = get_modality("point"), get_modality("fmri")
RNG = np.random.default_rng(0)
XYZ, COLOURS = cloud(400)


def table(xyz: np.ndarray = XYZ, colours: np.ndarray = COLOURS) -> np.ndarray:
    return np.concatenate([xyz.astype(np.float64), colours / 255], 1)


def read(part: Part) -> tuple[np.ndarray, list[str]]:
    """The points of a file, and what was noted about them."""
    with collect_damage() as damage:
        points: np.ndarray = POINT.decode({"point": part}, {})
    return points, damage


def refusal(part: Part) -> str:
    with pytest.raises(SampleError) as error:
        read(part)
    return error.value.what


@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("alpha", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scale", [1, 255])
def test_layouts_and_ranges_of_arrays(kind: str, alpha: bool, transposed: bool, scale: int) -> None:
    values = table()
    values[:, 3:] *= scale
    if alpha:
        values = np.concatenate([values, np.ones((400, 1))], 1)
    array = values.astype(kind)
    points, damage = read(npy(array.T if transposed else array))
    tolerance = 2e-3 if kind == "<f2" else 1e-6
    np.testing.assert_allclose(points, table(), atol=tolerance, rtol=tolerance)
    assert damage == [] and points.dtype == np.float32


def test_16_bit_colours() -> None:
    head = ply().decode("latin-1").replace("uchar", "ushort").split("end_header\n")[0]
    rows = np.zeros(400, [("p", "<f4", 3), ("c", "<u2", 3)])
    rows["p"], rows["c"] = XYZ, COLOURS.astype(np.uint16) * 257
    points, _ = read(Part("ply", f"{head}end_header\n".encode() + rows.tobytes()))
    np.testing.assert_allclose(points[:, 3:], COLOURS / 255, atol=1e-6)


@pytest.mark.parametrize("shape", [(400, 3), (3, 400), (400, 8), (400,), (2, 200, 6)])
def test_arrays_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    said = refusal(npy(np.zeros(shape)))
    assert str(shape) in said
    assert ("without colours" in said) == (3 in shape)


@given(
    st.integers(1, 60),
    st.sampled_from([np.nan, np.inf, -np.inf, 1e30, -1e38, 1e300]),
    st.sampled_from(["npy", "ply", "pcd"]),
)
@settings(max_examples=40, deadline=None)
def test_impossible_points_are_left_out_and_noted(bad: int, value: float, form: str) -> None:
    rng = np.random.default_rng(bad)
    rows = rng.choice(400, bad, replace=False)
    with np.errstate(over="ignore"):
        changed = XYZ.astype(np.float32).copy()
        changed[rows, rng.integers(0, 3)] = value
    if form == "npy":
        part = npy(table(changed))
    else:
        data = bytearray(ply() if form == "ply" else pcd())
        start = data.index(b"end_header\n" if form == "ply" else b"DATA binary\n")
        start = data.index(b"\n", start) + 1
        step = 15 if form == "ply" else 16
        for row in rows.tolist():
            struct.pack_into("<3f", data, start + row * step, *changed[row].tolist())
        part = Part(form, bytes(data))
    points, damage = read(part)
    good = np.setdiff1d(np.arange(400), rows)
    np.testing.assert_allclose(points, table()[good], atol=1e-6)
    if form != "pcd" or abs(value) < 1e39:  # in a PCD these are not a return of the scanner
        assert len(damage) == 1 and f"{bad} of 400 points" in damage[0]
    value_of_model = POINT.make_value(points, train=False, rng=RNG)
    assert torch.isfinite(value_of_model).all() and value_of_model[:, :3].abs().mean() > 0.05


def test_more_than_a_quarter_of_impossible_points_is_refused() -> None:
    changed = XYZ.copy()
    changed[:101] = np.nan
    assert "101 of 400 points" in refusal(npy(table(changed)))


@pytest.mark.parametrize("colours", [1e38, 300.0, -20.0, 11.0])
def test_impossible_colours_are_refused(colours: float) -> None:
    values = table()
    values[7, 4] = colours
    if colours == 11.0:
        values[8, 4] = -1.0
    assert "colours" in refusal(npy(values.astype(np.float32)))


def test_a_cloud_far_from_the_origin_keeps_its_shape() -> None:
    """Metres of a map's grid, 64 bits: fp32 would round them to half a metre."""
    far = table(XYZ.astype(np.float64) + np.array([691_000.0, 5_334_000.0, 500.0]))
    near, there = (POINT.make_value(read(npy(a))[0], train=False, rng=RNG) for a in (table(), far))
    torch.testing.assert_close(near, there, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"WIDTH 400", b"WIDTH -400"),
        (b"POINTS 400", b"POINTS -1"),
        (b"POINTS 400", b"POINTS 1000000000000"),
        (b"COUNT 1 1 1 1", b"COUNT 1 1 1 1000000000"),
        (b"COUNT 1 1 1 1", b"COUNT 1 1 1 -1"),
        (b"COUNT 1 1 1 1", b"COUNT 0 1 1 1"),
        (b"TYPE F F F U", b"TYPE S F F U"),
        (b"TYPE F F F U", b"TYPE O F F U"),
        (b"TYPE F F F U", b"TYPE M F F U"),
        (b"TYPE F F F U", b"TYPE F F F"),
        (b"SIZE 4 4 4 4", b"SIZE 3 4 4 4"),
        (b"FIELDS x y z rgb", b"FIELDS x x z rgb"),
        (b"FIELDS x y z rgb", b"FIELDS"),
        (b"DATA binary", b"DATA ascii"),
        (b"DATA binary", b"DATA"),
        (b"DATA binary", b"DATA binary_compressed"),
    ],
)
def test_headers_of_pcd_that_lie(old: bytes, new: bytes) -> None:
    data = pcd().replace(old, new)
    if old.startswith(b"WIDTH"):
        data = data.replace(b"POINTS 400\n", b"")
    assert ".pcd" in refusal(Part("pcd", data))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"vertex 400", b"vertex -400"),
        (b"vertex 400", b"vertex 99999999999999999999"),
        (b"vertex 400", b"vertex"),
        (b"vertex 400", b"vertex many"),
        (b"property float x", b"property"),
        (b"property float x", b"property string x"),
        (b"property float x", b"property float y"),
        (b"property float x", b"property list uchar int x"),
        (b"end_header", b"end_"),
    ],
)
@pytest.mark.parametrize("layout", ["binary_little_endian", "ascii"])
def test_headers_of_ply_that_lie(layout: str, old: bytes, new: bytes) -> None:
    assert ".ply" in refusal(Part("ply", ply(layout=layout).replace(old, new)))


@pytest.mark.parametrize("value", [b"300", b"-1", b"0.5", b"nan"])
def test_text_that_does_not_fit_its_field_is_no_other_colour(value: bytes) -> None:
    head, body = ply(layout="ascii").split(b"end_header\n")
    rows = body.split(b"\n")
    rows[9] = b" ".join([*rows[9].split()[:5], value])
    assert "field blue" in refusal(Part("ply", head + b"end_header\n" + b"\n".join(rows)))


def fmri(array: np.ndarray, scale: float | None = None) -> tuple[np.ndarray, list[str]]:
    with collect_damage() as damage:
        voxels: np.ndarray = FMRI.decode({"fmri": npy(array)}, {"fmri_scale": scale})
    return voxels, damage


SCANS = np.random.default_rng(1).normal(size=(3, 15724)).astype(np.float32)


def test_repetitions_may_be_rows_or_columns() -> None:
    rows, columns = fmri(SCANS)[0], fmri(np.ascontiguousarray(SCANS.T))[0]
    np.testing.assert_array_equal(rows, columns)
    np.testing.assert_array_equal(fmri(SCANS[:1])[0], fmri(SCANS[:1].T)[0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_repetition_that_is_not_finite_is_left_out_and_noted(value: float) -> None:
    scans = SCANS.copy()
    scans[1, 77] = value
    voxels, damage = fmri(scans)
    np.testing.assert_array_equal(voxels, fmri(SCANS[[0, 2]])[0])
    assert len(damage) == 1 and "1 of 3 repetitions" in damage[0]
    scans[:] = value
    with pytest.raises(SampleError, match="not finite"):
        fmri(scans)


@pytest.mark.parametrize("value", [1001.0, 12_000.0, 3e38])
@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_responses_in_another_unit_are_refused(value: float, kind: type) -> None:
    scans = SCANS[:2].astype(np.float64)
    scans[:, 5] = min(value, 32_000.0) if kind is np.int16 else value
    whole = kind is np.int16  # no responses unless a factor says how they were stored
    with pytest.raises(SampleError, match="the limit is 1000"):
        fmri(scans.astype(kind), 1.0 if whole else None)
    if whole:
        with pytest.raises(SampleError, match="holds whole numbers"):
            fmri(scans.astype(kind))
