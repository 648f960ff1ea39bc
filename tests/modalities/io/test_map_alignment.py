"""Maps and their pictures: turned together, or refused; holes stay holes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from media_samples import npy, photo, picture
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, depth, normal
from onellm_dist.modalities.files import read_file_value
from onellm_dist.modalities.io.damage import collect_damage
from onellm_dist.modalities.io.pictures import open_picture
from onellm_dist.modalities.pairs import MapPair, PairModality
from onellm_dist.shards.sources.readers.centre_square import CentreSquare

DEPTH, NORMAL = depth.MODALITY, normal.MODALITY
SIDEWAYS = [5, 6, 7, 8]


def tag(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def halves(width: int, height: int) -> Image.Image:
    """Red on the left, blue on the right; seen from its bright part, unlike in every turn."""
    array = np.zeros((height, width, 3), np.uint8)
    array[:, : width // 2, 0] = 250
    array[:, width // 2 :, 2] = 250
    array[: height // 2] //= 2
    return Image.fromarray(array)


def pair(photograph: Part, chart: Part, modality: PairModality = DEPTH) -> MapPair:
    found: MapPair = modality.decode({"image": photograph, modality.name: chart}, {})
    return found


def lies_on(found: MapPair) -> bool:
    """The map, a copy of the picture, still shows the same everywhere."""
    apart = np.asarray(found.picture).astype(int) - np.asarray(found.map).astype(int)
    return found.map.size == found.picture.size and float(np.abs(apart).mean()) < 8


@pytest.mark.parametrize("modality", [DEPTH, NORMAL])
@pytest.mark.parametrize("orientation", SIDEWAYS)
@pytest.mark.parametrize("scale", [1, 2])
def test_a_map_of_the_stored_pixels_is_turned_with_its_picture(
    modality: PairModality, orientation: int, scale: int
) -> None:
    image = halves(160, 90)
    photograph = picture(image, "PNG", exif=tag(orientation))
    chart = picture(image.resize((160 // scale, 90 // scale)), extension=f"{modality.name}.png")
    found = pair(photograph, chart, modality)
    assert found.picture.size == (90, 160) and lies_on(found)


@pytest.mark.parametrize("orientation", SIDEWAYS)
def test_a_map_of_the_upright_pixels_is_left_as_it_is(orientation: int) -> None:
    photograph = picture(halves(160, 90), "PNG", exif=tag(orientation))
    upright = pair(photograph, picture(Image.new("L", (90, 160), 5))).picture
    assert lies_on(pair(photograph, picture(upright, extension="depth.png")))


def test_a_float_map_is_turned_too() -> None:
    values = np.asarray(halves(160, 90).convert("L")).astype(np.float32) + 1
    photograph = picture(halves(160, 90).convert("L"), "PNG", exif=tag(6))
    found = pair(photograph, npy(values, "depth.npy"))
    shown, expected = (np.asarray(p.convert("L")).astype(float) for p in (found.map, found.picture))
    assert np.corrcoef(shown.ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.parametrize(
    ("size", "orientation", "chart"),
    [
        ((160, 90), 3, (160, 90)),
        ((160, 90), 2, (80, 45)),
        ((100, 100), 6, (100, 100)),
        ((160, 90), 8, (64, 64)),
    ],
)
def test_where_nothing_decides_the_sample_is_refused_with_both_names(
    size: tuple[int, int], orientation: int, chart: tuple[int, int]
) -> None:
    photograph = picture(halves(*size), "JPEG", "jpg", exif=tag(orientation))
    with pytest.raises(SampleError, match=r"\.jpg .* and \.depth\.png") as error:
        pair(photograph, picture(Image.new("L", chart, 9), extension="depth.png"))
    assert f"orientation {orientation}" in error.value.what
    assert '"map_orientation": "stored"' in error.value.do
    assert "-o describe=map_orientation=stored" in error.value.do
    stated = picture(Image.new("L", chart, 9), extension="depth.png", exif=tag(1))
    assert pair(photograph, stated).map.size == pair(photograph, stated).picture.size


@pytest.mark.parametrize("modality", [DEPTH, NORMAL])
@pytest.mark.parametrize("size", [(100, 100), (160, 90)])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stated", ["stored", "upright"])
def test_the_samples_json_says_which_pixels_the_map_was_made_from(
    modality: PairModality, size: tuple[int, int], orientation: int, stated: str
) -> None:
    image = halves(*size)
    photograph = picture(image, "PNG", exif=tag(orientation))
    drawn = image if stated == "stored" else open_picture(photograph).image
    meta = {"map_orientation": stated}
    chart = picture(drawn, extension=f"{modality.name}.png")
    assert lies_on(modality.decode({"image": photograph, modality.name: chart}, meta))
    if orientation in SIDEWAYS and size[0] != size[1]:  # the sizes show that it is not so
        wrong = {"map_orientation": "upright" if stated == "stored" else "stored"}
        with pytest.raises(SampleError, match="lie across each other"):
            modality.decode({"image": photograph, modality.name: chart}, wrong)


@pytest.mark.parametrize("stated", ["sideways", 6, True, ["stored"], ""])
def test_another_word_for_the_pixels_is_refused(stated: object) -> None:
    parts = {"image": picture(photo(60, 40)), "depth": picture(Image.new("L", (60, 40), 9))}
    with pytest.raises(SampleError, match="not stored or upright"):
        DEPTH.decode(parts, {"map_orientation": stated})


def test_a_map_with_an_orientation_of_its_own_is_turned_by_it() -> None:
    image = halves(160, 90)
    for orientation in (3, 6, 8):
        photograph, chart = (
            picture(image, "PNG", e, exif=tag(orientation)) for e in ("png", "depth.png")
        )
        assert lies_on(pair(photograph, chart))


def test_a_map_on_its_side_is_refused_and_other_shapes_are_stretched() -> None:
    photograph = picture(photo(160, 90))
    with pytest.raises(SampleError, match="on its side"):
        pair(photograph, picture(Image.new("L", (90, 160), 9), extension="depth.png"))
    for size in ((64, 64), (160, 120), (80, 45)):
        chart = picture(Image.new("L", size, 9), extension="depth.png")
        assert pair(photograph, chart).map.size == (160, 90)


@pytest.mark.parametrize("hole", [0.0, np.nan, np.inf, -np.inf, -3.0])
@pytest.mark.parametrize("distance", [False, True])
def test_pixels_of_a_depth_map_that_are_no_depth_become_0(hole: float, distance: bool) -> None:
    values = np.linspace(1, 5, 90, dtype=np.float32)[:, None].repeat(120, 1)
    plain = values.copy()
    values[:20], plain[:20] = hole, 0
    meta = {"depth_is_distance": distance}
    with collect_damage() as damage:
        shown = DEPTH.render(npy(values, "depth.npy"), meta)
    assert shown.tobytes() == DEPTH.render(npy(plain, "depth.npy"), meta).tobytes()
    assert np.asarray(shown)[:20].max() == 0 and np.asarray(shown)[20:].min() >= 1
    assert len(damage) == (not np.isfinite(hole))
    floats = picture(Image.fromarray(values), "TIFF", "depth.tif")
    assert DEPTH.render(floats, meta).tobytes() == shown.tobytes()


def test_depth_near_the_smallest_number_is_no_nan() -> None:
    values = np.full((8, 8), 2.0)
    values[0, 0] = 5e-324
    shown = np.asarray(DEPTH.render(npy(values, "depth.npy"), {"depth_is_distance": True}))
    assert shown[0, 0].max() == 0 and shown[1:].min() >= 1


def test_pixels_of_a_normal_map_that_are_no_normal_become_black() -> None:
    vectors = np.zeros((6, 8, 3), np.float32)
    vectors[..., 2] = 1
    vectors[1, 2, 0], vectors[3, 3, 2] = np.nan, np.inf
    with collect_damage() as damage:
        shown = np.asarray(NORMAL.render(npy(vectors, "normal.npy"), {}))
    assert shown[1, 2].tolist() == shown[3, 3].tolist() == [0, 0, 0]
    assert shown[0, 0].tolist() == [128, 128, 255] and "2 of 48 pixels" in damage[0]
    with pytest.raises(SampleError, match="finite"):
        NORMAL.render(npy(np.full((4, 4, 3), np.nan), "normal.npy"), {})


def test_a_pair_in_memory_is_read_as_files_are() -> None:
    image = photo(60, 40)
    chart = Image.fromarray((np.arange(2400, dtype=np.uint16) * 20).reshape(40, 60))
    files = pair(picture(image), picture(chart, extension="depth.png"))
    held = DEPTH.make_raw(MapPair(image.convert("RGBA"), chart))
    assert held.map.tobytes() == files.map.tobytes()
    assert held.picture.tobytes() == files.picture.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(160, 90), (100, 100)])
def test_a_pair_in_memory_is_aligned_as_files_are(size: tuple[int, int], orientation: int) -> None:
    """A turned photograph and a map of its stored pixels, as PIL opens them."""
    image = halves(*size)
    turned, chart = picture(image, "PNG", exif=tag(orientation)), picture(image)
    held = [Image.open(io.BytesIO(part.data)) for part in (turned, chart)]
    assert lies_on(DEPTH.make_raw(MapPair(held[0], held[1], "stored")))
    if orientation in (1, *SIDEWAYS[: 4 * (size[0] != size[1])]):
        assert lies_on(DEPTH.make_raw(MapPair(held[0], held[1])))
    else:
        with pytest.raises(SampleError, match=r"the picture is .* and the depth map"):
            DEPTH.make_raw(MapPair(held[0], held[1]))
    with pytest.raises(SampleError, match="the depth map is not a picture"):
        DEPTH.make_raw(MapPair(held[0], "x"))  # type: ignore[arg-type]


def test_generate_reads_what_is_said_of_a_map_with_omnidatas_name(tmp_path: Path) -> None:
    image = halves(100, 100)
    (tmp_path / "a.png").write_bytes(picture(image, "PNG", exif=tag(6)).data)
    (tmp_path / "a_depth.png").write_bytes(picture(image).data)
    with pytest.raises(SampleError, match="cannot be known"):
        read_file_value(DEPTH, tmp_path / "a_depth.png")
    (tmp_path / "a.json").write_text('{"map_orientation": "stored"}')
    value = read_file_value(DEPTH, tmp_path / "a_depth.png")
    assert torch.equal(value[0], value[1])


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def read_bytes(self) -> bytes:
        return self.data


def test_the_centre_square_of_a_turned_picture_is_refused() -> None:
    assert CentreSquare(_Bytes(picture(photo(60, 40)).data)).read_bytes()
    turned = picture(photo(60, 40), "JPEG", exif=tag(6))
    with pytest.raises(SampleError, match="orientation 6") as error:
        CentreSquare(_Bytes(turned.data)).read_bytes()
    assert "-o map_orientation=stored" in error.value.do


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("stated", ["stored", "upright"])
def test_the_centre_square_of_the_pixels_that_are_named(orientation: int, stated: str) -> None:
    image = halves(160, 90)
    photograph = picture(image, "PNG", exif=tag(orientation))
    seen = image if stated == "stored" else open_picture(photograph).image
    left, top = ((length - 90) // 2 for length in seen.size)
    chart = picture(seen.crop((left, top, left + 90, top + 90)), extension="depth.png")
    square = Part("jpg", CentreSquare(_Bytes(photograph.data), stated).read_bytes())
    found = DEPTH.decode({"image": square, "depth": chart}, {"map_orientation": stated})
    assert found.picture.size == (90, 90) and lies_on(found)
