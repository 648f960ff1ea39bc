"""Images, depth maps and normal maps: decoding, crops, normalisation, what is refused."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from media_samples import npy, photo, picture
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms import RandomResizedCrop

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, depth, get_modality, normal
from onellm_dist.modalities.pairs import PairModality
from onellm_dist.modalities.transforms.crops import CLIP_MEAN, CLIP_STD, choose_crop_box, crop_train

PARITY = load_file(Path(__file__).parents[1] / "fixtures/parity_preprocess/preprocess.safetensors")
IMAGE, DEPTH, NORMAL = get_modality("image"), depth.MODALITY, normal.MODALITY


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def unnormalise(values: torch.Tensor) -> np.ndarray:
    """[3, H, W] back to [H, W, 3] in 0..255."""
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    pixels: np.ndarray = ((values * deviation + mean) * 255).permute(1, 2, 0).numpy()
    return pixels


def test_eval_is_the_references() -> None:
    raw = IMAGE.decode({"image": picture(Image.fromarray(PARITY["image1.uint8_hwc"].numpy()))}, {})
    got = IMAGE.transform(raw, train=False, rng=rng())
    torch.testing.assert_close(got, PARITY["image1.eval_3x224x224"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("train", [True, False])
def test_every_format_gives_the_value_shape(form: str, train: bool) -> None:
    image = photo(313, 257)
    got = IMAGE.transform(IMAGE.decode({"image": picture(image, form)}, {}), train=train, rng=rng())
    assert got.shape == (3, 224, 224) and got.dtype == torch.float32
    assert unnormalise(got).mean() == pytest.approx(np.asarray(image).mean(), abs=6)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_other_colour_modes_become_rgb(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    raw = IMAGE.decode({"image": picture(photo().convert(mode), form)}, {})
    assert raw.mode == "RGB" and raw.size == (320, 240)


def test_sixteen_bit_grey_keeps_its_upper_byte() -> None:
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    raw = IMAGE.decode({"image": picture(Image.fromarray(deep))}, {})
    assert np.array_equal(np.asarray(raw)[..., 0], deep >> 8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    part = picture(photo(96, 64), "JPEG", exif=exif)
    raw = IMAGE.decode({"image": part}, {})
    assert np.array_equal(
        np.asarray(raw), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(part.data))))
    )


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"<html>404</html>",
        picture(photo()).data[:2000],
        picture(photo(), "JPEG").data[:-3000],
    ],
)
def test_what_is_no_picture_is_refused(data: bytes) -> None:
    with pytest.raises(SampleError) as error:
        IMAGE.decode({"image": Part("jpg", data)}, {})
    assert ".jpg" in error.value.what and error.value.why and error.value.do


@pytest.mark.parametrize("size", [(1, 1), (7, 3), (1, 5000), (30000, 2), (224, 224), (225, 224)])
@pytest.mark.parametrize("train", [True, False])
def test_extreme_sizes_work(size: tuple[int, int], train: bool) -> None:
    assert IMAGE.transform(Image.new("RGB", size, "red"), train=train, rng=rng()).shape == (
        3,
        224,
        224,
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(0, 2**32 - 1))
def test_random_boxes_lie_inside_and_are_large(width: int, height: int, seed: int) -> None:
    left, top, right, bottom = choose_crop_box(width, height, rng(seed))
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    if min(width, height) >= 32 and 0.8 < width / height < 1.25:
        assert (right - left) * (bottom - top) >= 0.87 * width * height


def test_random_boxes_are_distributed_as_torchvisions() -> None:
    image = Image.new("RGB", (300, 280))
    torch.manual_seed(0)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.9, 1.0], [0.75, 1.3333]) for _ in range(3000)],
        float,
    )
    boxes = np.array([choose_crop_box(300, 280, rng(i)) for i in range(3000)], float)
    ours = np.stack(
        [boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], 1
    )
    error = 4 * theirs.std(0) * (2 / 3000) ** 0.5
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < error).all()
    assert (np.abs(ours.std(0) - theirs.std(0)) < error).all()


SIZES = [(500, 400), (1600, 901), (260, 700), (225, 225), (480, 640), (120, 90), (9, 7)]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("kind", ["photo", "noise", "edges"])
def test_training_pixels_agree_with_pillows(width: int, height: int, kind: str) -> None:
    """Training resizes with torch, evaluation with Pillow: within 2 of 255, horizontal first."""
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    if kind == "photo":
        pixels = np.asarray(photo(width, height))
    elif kind == "edges":
        pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
    image = Image.fromarray(pixels)
    for seed in range(2):
        box = choose_crop_box(width, height, rng(seed))
        # Two steps, because Pillow 13 may swap the two directions.
        wide = image.crop(box).resize((224, box[3] - box[1]), Image.Resampling.BICUBIC)
        expected = np.asarray(wide.resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
        apart = np.abs(crop_train(image, box).astype(int) - expected)
        assert apart.max() <= 2
        assert (apart > 0).mean() <= 0.01


def test_training_is_a_function_of_the_generator_alone() -> None:
    raw = photo()
    first, again, other = (IMAGE.transform(raw, train=True, rng=rng(s)) for s in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_eval_draws_nothing() -> None:
    generator = rng(1)
    before = generator.bit_generator.state
    IMAGE.transform(photo(), train=False, rng=generator)
    assert generator.bit_generator.state == before


@pytest.mark.parametrize("modality", [DEPTH, NORMAL])
def test_pairs_are_cut_alike(modality: PairModality) -> None:
    """The same picture in both places stays the same in both through random crops."""
    part = picture(photo(300, 200))
    raw = modality.decode({modality.name: part, "image": part}, {})
    for seed in range(5):
        got = modality.transform(raw, train=True, rng=rng(seed))
        assert got.shape == (2, 3, 224, 224) and torch.equal(got[0], got[1])


def test_a_map_is_resized_to_its_picture_and_comes_second() -> None:
    raw = DEPTH.decode(
        {
            "image": picture(Image.new("RGB", (300, 200), "red")),
            "depth": picture(Image.new("L", (50, 50), 77)),
        },
        {},
    )
    assert raw.map.size == (300, 200)
    got = DEPTH.transform(raw, train=False, rng=rng())
    assert unnormalise(got[0])[100, 100] == pytest.approx([255, 0, 0], abs=1)
    assert unnormalise(got[1])[100, 100] == pytest.approx([77, 77, 77], abs=1)


@pytest.mark.parametrize("as_png", [True, False])
def test_deep_depth_maps_span_the_byte_over_their_valid_values(as_png: bool) -> None:
    values = np.array([[0, 1000], [2000, 3000]], np.uint16)
    part = (
        picture(Image.fromarray(values), extension="depth.png")
        if as_png
        else npy(values.astype(np.float32), "depth.npy")
    )
    grey = np.asarray(DEPTH.render(part, {}))[..., 0]
    assert grey.tolist() == [[0, 1], [128, 255]]
    near = np.asarray(DEPTH.render(part, {"depth_is_distance": True}))[..., 0]
    assert near[0, 0] == 0 and near[0, 1] == 255 and near[1, 1] == 1 and 1 < near[1, 0] < 128


def test_a_flat_depth_map_is_mid_grey() -> None:
    assert np.unique(
        np.asarray(DEPTH.render(npy(np.full((4, 4), 2.5), "depth.npy"), {}))
    ).tolist() == [128]


@pytest.mark.parametrize(
    "values",
    [np.zeros((4, 4)), np.full((4, 4), np.nan), np.ones((3, 4, 4)), np.ones(9), np.ones((1, 9))],
)
def test_bad_depth_maps_are_refused(values: np.ndarray) -> None:
    with pytest.raises(SampleError):
        DEPTH.decode({"depth": npy(values, "depth.npy"), "image": picture(photo())}, {})


@pytest.mark.parametrize("channels_first", [False, True])
def test_float_normals_become_the_usual_colours(channels_first: bool) -> None:
    vectors = np.zeros((5, 6, 3), np.float32)
    vectors[..., 2] = 1
    part = npy(vectors.transpose(2, 0, 1) if channels_first else vectors, "normal.npy")
    assert np.asarray(NORMAL.render(part, {}))[2, 2].tolist() == [128, 128, 255]


@pytest.mark.parametrize(
    "values", [np.full((4, 4, 3), 1.5), np.zeros((4, 4)), np.zeros((4, 4, 3), np.uint8)]
)
def test_bad_normals_are_refused(values: np.ndarray) -> None:
    with pytest.raises(SampleError):
        NORMAL.render(npy(values, "normal.npy"), {})


def test_a_map_given_by_hand_finds_its_picture(tmp_path: Path) -> None:
    (tmp_path / "room.depth.png").write_bytes(picture(Image.new("L", (9, 9))).data)
    (tmp_path / "room_normal.png").write_bytes(picture(Image.new("RGB", (9, 9))).data)
    with pytest.raises(SampleError, match="image"):
        DEPTH.read_parts(tmp_path / "room.depth.png")
    (tmp_path / "alone.png").write_bytes(picture(photo()).data)
    with pytest.raises(SampleError, match="itself"):
        DEPTH.read_parts(tmp_path / "alone.png")
    (tmp_path / "room.jpg").write_bytes(picture(photo(), "JPEG").data)
    assert DEPTH.decode(DEPTH.read_parts(tmp_path / "room.depth.png"), {}).map.size == (
        320,
        240,
    )
    assert NORMAL.decode(NORMAL.read_parts(tmp_path / "room_normal.png"), {}).map.size == (
        320,
        240,
    )
