"""One way to open a picture: every kind of file gives the same pixels to everyone who opens it."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from media_samples import photo, picture
from PIL import Image, PngImagePlugin

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.io.colour import convert_to_rgb
from onellm_dist.modalities.io.pictures import decode_picture, make_rgb_picture
from onellm_dist.model.processing.processor import OneLLMProcessor
from onellm_dist.serving.media import read_files
from onellm_dist.shards.build.images import compute_dhash, reencode_pictures
from onellm_dist.shards.sources.base import BadSampleError

IMAGE = get_modality("image")
FORMS = ["PNG", "BMP", "TIFF", "WEBP", "JPEG2000", "AVIF", "GIF", "PPM"]


DEEP = struct.pack(">3H", 1, 20_000, 60_000)
"""One pixel of 16-bit colours."""


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def chunk(kind: bytes, payload: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + payload))
    return struct.pack(">I", len(payload)) + kind + payload + checksum


def png(
    width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]
) -> Part:
    """A PNG from its fields: bits a sample, type of colour, filtered rows, further chunks."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    more = b"".join(chunk(kind, payload) for kind, payload in extra)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more
    return Part("png", data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def pixels(part: Part) -> np.ndarray:
    return np.asarray(decode_picture(part)).astype(int)


@pytest.mark.parametrize("form", FORMS)
def test_bytes_decide_on_the_format_and_every_door_reads_them(form: str, tmp_path: Path) -> None:
    """A file of any format that is called .jpg: training, builder, generate, processor."""
    image = photo(96, 64)
    part = picture(image, form, "jpg", quality=100, lossless=True)
    seen = IMAGE.read_value({"image": part}, {}, train=False, rng=rng())
    lossy = {"GIF": 40, "AVIF": 12}.get(form, 0)
    assert np.abs(pixels(part) - np.asarray(image).astype(int)).mean() <= lossy
    (tmp_path / "x.jpg").write_bytes(part.data)
    assert torch.equal(read_files([("image", tmp_path / "x.jpg")])["image"][0], seen)
    small = reencode_pictures({"jpg": part.data}, frozenset({"jpg"}), 32, 100)["jpg"]
    with Image.open(io.BytesIO(small)) as stored:
        assert (stored.format, stored.size) == ("JPEG", (48, 32))
    assert compute_dhash(part.data) == compute_dhash(picture(decode_picture(part), "PNG").data)


def every_mode() -> dict[str, Image.Image]:
    """The same picture in every mode that Pillow knows, with transparency where it can be."""
    image = photo(40, 30)
    clear = image.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(image.size))
    deep = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    found = {m: image.convert(m) for m in ("L", "P", "1", "CMYK", "YCbCr", "HSV", "RGB", "RGBX")}
    found |= {"RGBA": clear, "LA": clear.convert("LA"), "P clear": clear.quantize(64)}
    found |= {"RGBa": clear.convert("RGBa"), "La": clear.convert("LA").convert("La")}
    found |= {"I;16": deep, "I": deep.convert("I"), "F": image.convert("F")}
    return found


@pytest.mark.parametrize("mode", list(every_mode()))
def test_pictures_in_memory_are_read_as_files_are(mode: str, tmp_path: Path) -> None:
    image = every_mode()[mode]
    form = "TIFF" if mode in ("CMYK", "F", "I") else "PNG"
    # Pillow 12 writes TIFF in YCbCr that it cannot read.
    not_stored = ("HSV", "RGBX", "RGBa", "La", "YCbCr")
    stored = convert_to_rgb(image) if mode in not_stored else image
    part = picture(stored, form)
    kept = image.copy()
    held = make_rgb_picture(image)
    assert held.mode == "RGB"
    assert np.array_equal(np.asarray(held), pixels(part))
    assert np.array_equal(np.asarray(image), np.asarray(kept))  # not changed
    (tmp_path / "x.png").write_bytes(part.data)
    from onellm_dist.model.presets import load_toy_tokenizer

    processor = OneLLMProcessor(load_toy_tokenizer())
    held_too = processor(text="", image=image)["image_values"]
    assert torch.equal(held_too, processor(text="", image=tmp_path / "x.png")["image_values"])
    # what viewers show: close to the picture, but for what lies on white
    if mode not in ("1", "P", "P clear"):
        grey = mode in ("L", "LA", "La", "I;16", "I", "F")
        plain = photo(40, 30).convert("L").convert("RGB") if grey else photo(40, 30)
        white = np.asarray(plain).astype(float)
        if mode in ("RGBA", "LA", "RGBa", "La"):
            share = np.asarray(every_mode()["RGBA"])[..., 3:] / 255
            white = white * share + 255 * (1 - share)
        assert np.abs(np.asarray(held).astype(float) - white).mean() < 4


def test_arrays_are_pictures_too() -> None:
    image = photo(20, 10)
    array = np.asarray(image)
    assert make_rgb_picture(array).tobytes() == image.tobytes()
    assert make_rgb_picture(array[..., 0]).size == (20, 10)
    assert make_rgb_picture(array[..., :1].astype(np.uint16) * 257).getpixel((3, 3)) == (
        (int(array[3, 3, 0]),) * 3
    )
    assert make_rgb_picture(array.transpose(2, 0, 1)).tobytes() == image.tobytes()
    assert make_rgb_picture(array.astype(np.float32) / 255).tobytes() == image.tobytes()
    for bad in (array.astype(np.float32), array[None], np.zeros(5, np.uint8)):
        with pytest.raises(SampleError, match="not a picture"):
            make_rgb_picture(bad)


def test_deep_grey_is_scaled_and_never_all_white(tmp_path: Path) -> None:
    ramp = (1000 + np.linspace(0, 60000, 500)).astype(np.uint16)[None].repeat(400, 0)
    part = picture(Image.fromarray(ramp))
    assert np.array_equal(pixels(part)[..., 0], ramp >> 8)
    small = reencode_pictures({"png": part.data}, frozenset({"png"}), 256, None)["jpg"]
    assert np.asarray(Image.open(io.BytesIO(small)).convert("L")).std() > 60
    flat = picture(Image.fromarray(np.full((30, 30), 40_000, np.uint16)))
    assert compute_dhash(part.data) != compute_dhash(flat.data)
    for values in (ramp / 65535, ramp / 257, ramp * 1e9, -ramp.astype(float)):
        floats = picture(Image.fromarray(values.astype(np.float32)), "TIFF")
        assert pixels(floats).std() > 60
    holes = (ramp / 65535).astype(np.float32)
    holes[:5] = [np.nan] * 500
    assert pixels(picture(Image.fromarray(holes), "TIFF"))[:5].max() == 0


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (png(2, 1, 8, 0, b"\0\x05\x09", (b"tRNS", b"\0\x05")), [255, 9]),
        (png(2, 1, 2, 0, b"\0\x50", (b"tRNS", b"\0\x01")), [255, 255]),
        (png(2, 1, 16, 0, struct.pack(">BHH", 0, 5, 9000), (b"tRNS", b"\0\x05")), [255, 140]),
        (png(2, 1, 8, 4, b"\0\x00\x00\x00\x80"), [255, 127]),
        (
            png(
                1, 1, 16, 2, struct.pack(">B3H", 0, 1, 2, 3), (b"tRNS", struct.pack(">3H", 1, 2, 3))
            ),
            [255],
        ),
        (
            png(2, 1, 8, 3, b"\0\0\1", (b"PLTE", b"\x0a" * 6), (b"tRNS", b"\0\x80")),
            [255, 132],
        ),
    ],
)
def test_every_kind_of_transparency_lies_on_white(part: Part, expected: list[int]) -> None:
    assert pixels(part)[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    "kind", ["zip text", "text", "profile", "broken text", "broken profile", "XMP"]
)
def test_metadata_decides_nothing(kind: str) -> None:
    image, info = photo(50, 40), PngImagePlugin.PngInfo()
    profile = b"\0" * 1_200_000 if kind in ("profile", "broken profile") else None
    if kind in ("zip text", "broken text"):
        info.add_text("workflow", "x" * 1_300_000, zip=True)
    elif kind == "text":
        info.add_text("workflow", "x" * 2_000_000)
    elif kind == "XMP":
        info.add_itxt("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
    data = picture(image, "PNG", pnginfo=info, icc_profile=profile).data
    if kind.startswith("broken"):
        at = data.index(b"zTXt" if kind == "broken text" else b"iCCP")
        data = data[: at + 30] + b"\xff" + data[at + 31 :]
    assert np.array_equal(pixels(Part("png", data)), np.asarray(image))
    cut = Part("png", data[: data.index(b"IDAT") + 400])
    with pytest.raises(SampleError, match="not a readable"):
        decode_picture(cut)


def test_orientation_survives_the_removal_of_metadata() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 1_300_000, zip=True)
    part = picture(photo(50, 40), "PNG", pnginfo=info, exif=exif)
    assert decode_picture(part).size == (40, 50)


@pytest.mark.parametrize("form", ["TIFF", "WEBP", "PNG", "AVIF", "JPEG"])
@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 8])
def test_every_door_turns_a_picture_once(form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = photo(64, 48)
    part = picture(image, form, exif=exif)
    upright = picture(decode_picture(part), "PNG")
    assert decode_picture(part).size == ((64, 48) if orientation < 5 else (48, 64))
    small = reencode_pictures({"x": part.data}, frozenset({"x"}), None, 100)["jpg"]
    assert np.abs(pixels(Part("jpg", small)) - pixels(upright)).mean() < 6
    assert compute_dhash(part.data) == compute_dhash(upright.data)
    opened = Image.open(io.BytesIO(part.data))
    assert make_rgb_picture(opened).tobytes() == decode_picture(part).tobytes()


def test_the_first_frame_and_the_first_page_are_taken() -> None:
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    for form in ("GIF", "TIFF", "PNG", "WEBP"):
        part = picture(red, form, save_all=True, append_images=[blue])
        colour = pixels(part)[8, 8]
        assert colour[0] > 240 and colour[2] < 10, form


@pytest.mark.parametrize("size", [(100_000_000, 1), (1, 50_000_000), (60_000, 60_000)])
def test_a_huge_picture_is_refused_from_its_header_by_every_door(size: tuple[int, int]) -> None:
    part = png(*size, 1, 0, b"\0")
    words = f"{size[0]:,} x {size[1]:,} pixels|bomb"
    with pytest.raises(SampleError, match=words):
        IMAGE.read_raw({"image": part}, {})
    with pytest.raises(BadSampleError, match=words):
        reencode_pictures({"png": part.data}, frozenset({"png"}), 100, None)
    with pytest.raises(BadSampleError, match=words):
        compute_dhash(part.data)


def test_a_large_picture_is_cropped_in_strips_as_a_small_one_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = photo(211, 173)
    clear = image.convert("RGBA")
    clear.putalpha(Image.radial_gradient("L").resize(image.size))
    cropped, on_white = IMAGE.transform(image, train=True, rng=rng()), convert_to_rgb(clear)
    monkeypatch.setattr("onellm_dist.modalities.transforms.crops._STRIP", 1000)
    monkeypatch.setattr("onellm_dist.modalities.io.colour._STRIP", 1000)
    assert torch.equal(IMAGE.transform(image, train=True, rng=rng()), cropped)
    assert convert_to_rgb(clear).tobytes() == on_white.tobytes()
