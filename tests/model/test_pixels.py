"""Pixels that the loader carries as bytes are the floats of the transform, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from packs import make_pack, small_model
from PIL import Image

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.modalities.image import ImageModality
from onellm_dist.modalities.pairs import MapPair
from onellm_dist.modalities.transforms.crops import LARGEST, normalise
from onellm_dist.model.pixels import make_input, normalise_pixels

CARRIED = ("image", "depth", "normal")


def all_bytes() -> torch.Tensor:
    """[2, 3, 16, 16]: every byte in every channel."""
    one = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    return torch.cat([one, one.flip(2)])


def draw_noise(seed: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (250, 301, 3), dtype=np.uint8)
    )


def test_every_byte_becomes_the_same_number_on_both_ways() -> None:
    pixels = all_bytes()
    assert torch.equal(normalise_pixels(pixels), normalise(pixels))
    assert normalise_pixels(pixels[:0]).shape == (0, 3, 16, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_every_byte_becomes_the_same_number_on_a_gpu() -> None:
    assert torch.equal(normalise_pixels(all_bytes().cuda()).cpu(), normalise(all_bytes()))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", CARRIED)
def test_what_the_loader_carries_becomes_the_models_input(name: str, train: bool) -> None:
    modality = get_modality(name)
    raw = draw_noise(0) if name == "image" else MapPair(draw_noise(0), draw_noise(1))
    value = modality.make_value(raw, train=train, rng=np.random.default_rng(3))
    carried = modality.make_loader_value(raw, train=train, rng=np.random.default_rng(3))
    assert carried.dtype == modality.loader_dtype == torch.uint8
    assert tuple(carried.shape) == modality.value_shape
    assert torch.equal(make_input(name, carried[None])[0], value)


def test_modalities_of_floats_are_carried_as_they_were() -> None:
    others = [m for name, m in all_modalities().items() if name not in CARRIED]
    assert {m.loader_dtype for m in others} == {torch.float32}
    with pytest.raises(OneLLMError, match="imu values are uint8"):
        make_input("imu", torch.zeros(1, 6, 400, dtype=torch.uint8))


def test_a_transform_of_one_s_own_is_what_is_carried() -> None:
    class Halved(ImageModality):
        def transform(
            self, raw: Image.Image, *, train: bool, rng: np.random.Generator
        ) -> torch.Tensor:
            return super().transform(raw, train=train, rng=rng) / 2

    class HalvedLater(ImageModality):
        def make_value(
            self, raw: Image.Image, *, train: bool, rng: np.random.Generator
        ) -> torch.Tensor:
            return super().make_value(raw, train=train, rng=rng) / 2

    whole = get_modality("image").make_value(
        draw_noise(0), train=False, rng=np.random.default_rng(0)
    )
    for modality in (Halved(), HalvedLater()):
        carried = modality.make_loader_value(
            draw_noise(0), train=False, rng=np.random.default_rng(0)
        )
        assert modality.loader_dtype == carried.dtype == torch.float32
        assert torch.equal(carried, whole / 2)


def test_limits_of_one_s_own_are_checked_unless_every_byte_is_within_them() -> None:
    class Dim(ImageModality):
        limits = replace(ImageModality.limits, magnitude=2)

    class Bright(ImageModality):
        limits = replace(ImageModality.limits, magnitude=LARGEST)

    white, rng = Image.new("RGB", (224, 224), "white"), np.random.default_rng(0)
    with pytest.raises(SampleError, match=r"a value of 2\.\d+; the limit is 2"):
        Dim().make_loader_value(white, train=False, rng=rng)
    assert Dim().loader_dtype == torch.float32 and Bright().loader_dtype == torch.uint8
    assert Bright().make_loader_value(white, train=False, rng=rng).eq(255).all()
    assert float(normalise(all_bytes()).abs().max()) == LARGEST


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_pixels_that_are_not_rgb_are_refused(channels: int) -> None:
    class Layered(ImageModality):
        def cut_pixels(
            self, raw: Image.Image, *, train: bool, rng: np.random.Generator
        ) -> torch.Tensor:
            return torch.zeros(channels, 224, 224, dtype=torch.uint8)

    with pytest.raises(OneLLMError, match=rf"pixels are \({channels}, 224, 224\) of torch\.uint8"):
        Layered().make_value(draw_noise(0), train=False, rng=np.random.default_rng(0))
    with pytest.raises(OneLLMError, match=r"not \[\.\.\., 3, height, width\]"):
        normalise_pixels(torch.zeros(2, channels, 4, 4, dtype=torch.uint8))


def test_pixels_that_are_no_bytes_are_refused() -> None:
    for kind in (torch.int64, torch.float32, torch.bool):
        for convert in (normalise, normalise_pixels):
            with pytest.raises(OneLLMError, match=f"of {kind}, not"):
                convert(torch.zeros(3, 4, 4, dtype=kind))


def test_loss_and_gradients_are_those_of_the_floats() -> None:
    pack = make_pack([("image", "depth"), ("normal",), ("imu",), ("image",), ()], [5, 7, 4, 6, 3])
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randint(0, 256, value.shape, generator=generator, dtype=torch.uint8)
        if name in CARRIED
        else value
        for name, value in pack.values.items()
    }
    floats = {n: normalise(v) if n in CARRIED else v for n, v in values.items()}
    found = []
    for given in (values, floats):
        model = small_model()
        out = model(packed=replace(pack, values=given))
        out.loss.backward()
        found.append((out.loss, {n: p.grad for n, p in model.named_parameters()}))
    assert torch.equal(found[0][0], found[1][0])
    for name, grad in found[0][1].items():
        other = found[1][1][name]
        assert (grad is None) == (other is None), name
        assert grad is None or other is None or torch.equal(grad, other), name
