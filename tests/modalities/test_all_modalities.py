"""What holds for every modality: broken bytes, previews, random numbers, choosing parts."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
import torch
from media_samples import broken, npy, photo, picture, sound, sound_by_ffmpeg, tone, video
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, all_modalities, get_modality

NAMES = ("image", "video", "audio", "point", "depth", "normal", "imu", "fmri")


@cache
def good(name: str) -> dict[str, Part]:
    rng = np.random.default_rng(4)
    pair = {
        "image": picture(photo(), "JPEG", "jpg"),
        "depth": picture(Image.new("L", (32, 24), 9)),
        "normal": picture(photo(32, 24)),
    }
    return {
        "image": {"image": picture(photo(), "WEBP")},
        "video": {"video": Part("mp4", video(frames=30))},
        "audio": {"audio": sound(tone(44100), 44100, "FLAC")},
        "point": {"point": npy(rng.random((8192, 6)).astype(np.float32))},
        "depth": {k: pair[k] for k in ("depth", "image")},
        "normal": {k: pair[k] for k in ("normal", "image")},
        "imu": {"imu": npy(rng.normal(size=(6, 400)))},
        "fmri": {"fmri": npy(rng.normal(size=(3, 15724)))},
    }[name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [True, False])
def test_good_parts_become_finite_values_of_the_right_shape(name: str, train: bool) -> None:
    modality = get_modality(name)
    got = modality.transform(
        modality.decode(good(name), {}), train=train, rng=np.random.default_rng(0)
    )
    assert (
        got.shape == modality.value_shape
        and got.dtype == torch.float32
        and torch.isfinite(got).all()
    )


@pytest.mark.parametrize("name", NAMES)
def test_transform_does_not_change_the_raw_signal(name: str) -> None:
    modality = get_modality(name)
    raw = modality.decode(good(name), {})
    first = modality.transform(raw, train=False, rng=np.random.default_rng(0))
    first.add_(1)  # nor may the values share its memory
    modality.transform(raw, train=True, rng=np.random.default_rng(1))
    assert torch.equal(
        modality.transform(raw, train=False, rng=np.random.default_rng(2)) + 1, first
    )


@pytest.mark.parametrize("name", NAMES)
def test_previews_are_pictures_of_a_size_for_a_report(name: str) -> None:
    modality = get_modality(name)
    shown = modality.preview(modality.decode(good(name), {}))
    assert shown.mode == "RGB" and 200 <= shown.width <= 460 and 40 <= shown.height <= 460
    assert np.asarray(shown).std() > 5  # something is on it


OTHERS: list[tuple[str, Callable[[], dict[str, Part]]]] = [
    ("image", lambda: {"image": picture(photo(), "PNG")}),
    ("image", lambda: {"image": picture(photo(), "JPEG")}),
    ("video", lambda: {"video": Part("avi", video("avi", "mpeg4", frames=30))}),
    ("video", lambda: {"video": Part("mkv", video("matroska", frames=30, options={"g": "10"}))}),
    ("audio", lambda: {"audio": sound(tone(), 16000)}),
    ("audio", lambda: {"audio": sound(tone(), 16000, "OGG")}),
    ("audio", lambda: {"audio": Part("mp3", sound_by_ffmpeg(tone(), 16000, "mp3", "libmp3lame"))}),
]


@pytest.mark.parametrize(("name", "make"), [*((n, partial(good, n)) for n in NAMES), *OTHERS])
@pytest.mark.seconds
def test_broken_bytes_give_values_or_a_sample_error_and_nothing_else(
    name: str, make: Callable[[], dict[str, Part]]
) -> None:
    modality, parts = get_modality(name), make()
    role = next(iter(parts))
    errors: list[SampleError] = []
    for seed in range(45):
        damaged = {**parts, role: Part(parts[role].extension, broken(parts[role].data, seed))}
        try:
            got = modality.transform(
                modality.decode(damaged, {}), train=True, rng=np.random.default_rng(0)
            )
        except SampleError as error:
            errors.append(error)
        else:
            assert got.shape == modality.value_shape and torch.isfinite(got).all()
    assert len(errors) >= 10
    assert all(e.what and e.why and e.do and len(e.what) < 600 for e in errors)


@pytest.mark.parametrize("name", NAMES)
def test_the_most_specific_part_of_a_role_is_chosen(name: str) -> None:
    modality = get_modality(name)
    everything = {
        extension for accepted in modality.required_parts.values() for extension in accepted
    }
    found = modality.match(everything)
    assert {role: found[role] for role in modality.required_parts} == {
        role: accepted[0] for role, accepted in modality.required_parts.items()
    }
    with pytest.raises(SampleError):
        modality.match({"txt", "json"})


def test_a_sample_of_all_modalities_can_be_distinguished() -> None:
    extensions = {
        "jpg",
        "mp4",
        "wav",
        "point.npy",
        "depth.png",
        "normal.png",
        "imu.npy",
        "timestamps.npy",
        "fmri.npy",
        "txt",
        "json",
    }
    taken = [
        e
        for m in all_modalities().values()
        for role, e in m.match(extensions).items()
        if role != "image"
    ]
    assert len(taken) == len(set(taken)) == 8
