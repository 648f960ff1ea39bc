"""Pictures of the model's inputs: what is left of a medium once it was transformed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.modalities.base import Modality
from onellm_dist.modalities.pairs import MapPair
from onellm_dist.modalities.transforms.crops import (
    crop_eval,
    make_picture,
    normalise,
    split_channels,
)


def make_noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def draw(name: str, raw: Any) -> Image.Image:
    modality = get_modality(name)
    value = modality.make_value(raw, train=False, rng=np.random.default_rng(0))
    return modality.draw_value(value)


def test_a_normalised_picture_comes_back() -> None:
    picture = make_noise((224, 224))
    value = normalise(split_channels(picture))
    assert np.array_equal(np.asarray(make_picture(value)), np.asarray(picture))


def test_pictures_show_the_crop_that_the_model_sees() -> None:
    wide = make_noise((600, 300))
    assert np.array_equal(np.asarray(draw("image", wide)), np.asarray(crop_eval(wide)))
    other = make_noise((600, 300), seed=1)
    for name in ("depth", "normal"):
        both = np.asarray(draw(name, MapPair(wide, other)))
        assert np.array_equal(both[:, :224], np.asarray(crop_eval(wide)))
        assert np.array_equal(both[:, -224:], np.asarray(crop_eval(other)))


def test_a_film_shows_the_crops_of_its_frames() -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    value = torch.stack(
        [
            normalise(split_channels(Image.new("RGB", (224, 224), c)))
            for c in colours
            for _ in range(3)
        ]
    )
    drawn = get_modality("video").draw_value(value)
    assert drawn.size == (5 * 86 + 4 * 4, 3 * 86 + 2 * 4)
    for column, colour in enumerate(colours):
        for row in range(3):
            assert drawn.getpixel((column * 90 + 40, row * 90 + 40)) == colour


@pytest.mark.parametrize("name", list(all_modalities()))
def test_other_inputs_give_other_pictures(name: str) -> None:
    modality = get_modality(name)
    generator = torch.Generator().manual_seed(0)
    values = [torch.rand(modality.value_shape, generator=generator) for _ in range(2)]
    first, second = (modality.draw_value(value) for value in values)
    assert first.mode == "RGB" and first.size == second.size and min(first.size) >= 200
    assert not np.array_equal(np.asarray(first), np.asarray(second))
    plain = [Modality.draw_value(modality, value) for value in values]  # as of a modality without
    assert not np.array_equal(np.asarray(plain[0]), np.asarray(plain[1]))
