"""Pictures of 10 to 16 bits, and of integers: as bright as they are, from every kind of file."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.files import read_file_value
from onellm_dist.modalities.io.colour import scale_to_bytes
from onellm_dist.modalities.io.damage import ASSUMED, collect_damage
from onellm_dist.modalities.io.pictures import decode_picture
from onellm_dist.shards.build.prepare import prepare_sample
from onellm_dist.shards.build.settings import OPTIONS, BuildSettings
from onellm_dist.shards.sources.base import RawSample

DEPTHS = [1, 2, 4, 8, 10, 12, 14, 16]
_SETTINGS = BuildSettings(
    **{**{name: option.default for name, option in OPTIONS.items()}, "name": "n", "licence": ""}
)


def chunk(kind: bytes, payload: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + payload))
    return struct.pack(">I", len(payload)) + kind + payload + checksum


def png(values: np.ndarray, significant: int | None = None) -> bytes:
    """16-bit grey [H, W], grey with opacity [H, W, 2], RGB or RGBA."""
    bands = 1 if values.ndim == 2 else values.shape[2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], len(values), 16, colour, 0, 0, 0)
    said = chunk(b"sBIT", bytes([significant] * bands)) if significant is not None else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + said
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(values: np.ndarray, *tags: tuple[int, int, int], bits: int = 16) -> bytes:
    """Uncompressed little-endian; 12 bits are packed."""
    bands = 1 if values.ndim == 2 else values.shape[2]
    content = values.astype("<u2").tobytes()
    if bits == 12:
        flat = values.reshape(-1, 2).astype(np.uint32)
        packed = flat[:, 0] << 12 | flat[:, 1]
        content = packed.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    count = 9 + len(tags)
    after = 8 + 2 + 12 * count + 4
    sizes = (258, 3, 1, bits) if bands == 1 else (258, 3, bands, after)
    entries = [
        (256, 4, 1, values.shape[1]),
        (257, 4, 1, len(values)),
        sizes,
        (259, 3, 1, 1),
        (262, 3, 1, 1 if bands == 1 else 2),
        (273, 4, 1, after + 8),
        (277, 3, 1, bands),
        (278, 4, 1, len(values)),
        (279, 4, 1, len(content)),
        *((tag, kind, 1, value) for tag, kind, value in tags),
    ]
    table = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    head = b"II*\0" + struct.pack("<IH", 8, count) + table + struct.pack("<I", 0)
    return head + struct.pack("<4H", *[bits] * bands, *[0] * (4 - bands)) + content


def decode(data: bytes, extension: str = "png") -> tuple[np.ndarray, list[str]]:
    with collect_damage() as notes:
        shown = np.asarray(decode_picture(Part(extension, data))).astype(int)
    return shown, notes


def ramp(bits: int, bands: int = 1) -> np.ndarray:
    """[48, 64] or [48, 64, bands] from black to white of this many bits."""
    grey = np.round(np.linspace(0, (1 << bits) - 1, 64 * 48)).reshape(48, 64).astype(np.uint16)
    return grey if bands == 1 else np.stack([grey, *[grey[::-1]] * (bands - 1)], -1)


def expected(values: np.ndarray, bits: int) -> np.ndarray:
    return values / ((1 << bits) - 1) * 255


@pytest.mark.parametrize(
    ("form", "bands"), [("png", 1), ("png", 3), ("png", 4), ("tiff", 1), ("tiff", 3), ("lzw", 1)]
)
@pytest.mark.parametrize("bits", DEPTHS)
def test_values_of_any_depth_in_16_bits_are_as_bright_as_they_are(
    bits: int, form: str, bands: int
) -> None:
    values = ramp(bits, bands)
    if bands == 4:
        values[..., 3] = 65535  # opaque
    data = png(values) if form == "png" else tiff(values)
    if form == "lzw":
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "TIFF", compression="tiff_lzw")
        data = buffer.getvalue()
    shown, notes = decode(data, form)
    wanted = expected(values if bands > 1 else values[..., None].repeat(3, 2), bits)[..., :3]
    assert np.abs(shown - wanted).max() <= 1
    assert len(notes) == (bits < 16) and all(f"taken as {bits} bits" in n for n in notes)


@pytest.mark.parametrize("bits", [10, 12, 14])
@pytest.mark.parametrize("bands", [1, 3])
def test_what_the_file_says_decides(bits: int, bands: int) -> None:
    """A dark picture of 14 bits stays dark where the file says that it has 14."""
    dark = ramp(9, bands)
    wanted = expected(dark if bands > 1 else dark[..., None].repeat(3, 2), bits)
    files = [png(dark, bits), tiff(dark, (341, 3, (1 << bits) - 1))]
    if bits == 12 and bands == 1:
        files.append(tiff(dark, bits=12))
    for data in files:
        shown, notes = decode(data, "tiff")
        assert np.abs(shown - wanted).max() <= 1 and notes == []


def test_a_statement_that_the_values_contradict_is_none() -> None:
    """A PNG of 12 significant bits that are scaled to 16, as its specification wants."""
    values = (ramp(12).astype(np.uint32) * 65535 // 4095).astype(np.uint16)
    shown, notes = decode(png(values, 12))
    assert np.abs(shown[..., 0] - expected(values, 16)).max() <= 1 and notes == []


@pytest.mark.parametrize("white", [1023, 4095, 65535])
@pytest.mark.parametrize(("magic", "bands"), [(b"P5", 1), (b"P6", 3)])
def test_the_maximum_of_a_pgm_and_ppm_is_white(white: int, magic: bytes, bands: int) -> None:
    values = ramp(10, bands)
    data = magic + b" 64 48 %d\n" % white + values.astype(">u2").tobytes()
    shown, notes = decode(data, "png")
    wanted = values if bands > 1 else values[..., None].repeat(3, 2)
    assert np.abs(shown - wanted / white * 255).max() <= 1 and notes == []


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_grey_with_opacity_is_as_bright_as_it_is(bits: int) -> None:
    values = np.stack([ramp(bits), np.full((48, 64), 65535, np.uint16)], -1)
    shown, notes = decode(png(values))
    assert np.abs(shown[..., 0] - expected(values[..., 0], bits)).max() <= 1
    assert len(notes) == (bits < 16)


def test_black_on_transparent_stays_black_on_white() -> None:
    """Line art and signatures: grey is 0 everywhere, and the drawing is in the opacity."""
    values = np.zeros((48, 64, 2), np.uint16)
    values[10:20, 10:20, 1] = 65535
    shown, notes = decode(png(values))
    assert notes == [] and (shown[10:20, 10:20] == 0).all() and (shown[30:] == 255).all()


def test_a_transparent_colour_stays_transparent() -> None:
    values = ramp(12, 3)
    values[0, 0] = (100, 200, 300)
    data = png(values)
    at = data.index(b"IDAT") - 4
    data = data[:at] + chunk(b"tRNS", struct.pack(">3H", 100, 200, 300)) + data[at:]
    shown, _ = decode(data)
    assert shown[0, 0].tolist() == [255] * 3 and shown[-1, -1].tolist() != [255] * 3


@settings(max_examples=200, deadline=None)
@given(
    largest=st.integers(0, 65535),
    dtype=st.sampled_from(["u2", "i4", "i8"]),
    seed=st.integers(0, 9),
)
def test_no_integers_come_out_dark_without_a_note(largest: int, dtype: str, seed: int) -> None:
    """8, 10, 12, 14, 16 bits and int32: brightness is kept in order, white is where it belongs."""
    rng = np.random.default_rng(seed)
    values = rng.integers(0, largest + 1, (12, 13)).astype(dtype)
    values[3, 4] = largest
    with collect_damage() as notes:
        shown = scale_to_bytes(values)
    again = scale_to_bytes(values)
    assert shown.dtype == np.uint8 and np.array_equal(shown, again)
    order = np.argsort(values, axis=None, kind="stable")
    assert (np.diff(shown.reshape(-1)[order].astype(int)) >= 0).all()
    bits = next(b for b in DEPTHS if largest < 1 << b)
    assert abs(int(shown[3, 4]) - 255 * largest / ((1 << bits) - 1)) <= 1
    assert len(notes) == (largest > 0 and bits < 16)


@pytest.mark.parametrize("values", [np.arange(256), np.arange(256) * 16, np.arange(256) * 257])
def test_int32_is_shown_as_bright_as_it_is(values: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(values.reshape(16, 16).astype(np.int32)).save(buffer, "TIFF")
    shown, _ = decode(buffer.getvalue(), "tif")
    assert np.abs(shown[..., 0].reshape(-1) - np.arange(256)).max() <= 1


def test_a_build_notes_what_was_assumed_and_generate_says_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png(ramp(12)))
    built = prepare_sample(RawSample("x", "x", {"png": path}, "a caption"), ("image",), _SETTINGS)
    said = "16-bit values of at most 4,095 are taken as 12 bits (white is 4,095)"
    assert built.parts is not None and built.damage == (f"{ASSUMED}{said}",)
    value = read_file_value(get_modality("image"), path)
    assert [m for m in caplog.messages if said in m] and "damaged" not in caplog.text
    assert value.max() > 1.5  # white
