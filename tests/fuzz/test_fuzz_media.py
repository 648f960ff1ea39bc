"""Mutated media of the eight modalities: a value within its limits, or a refusal in words.

What is read for training is read again for evaluation; both are finite, of the modality's shape and
within its limits. That all doors agree about a file is tested in tests/modalities.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from harness import fuzz
from media_samples import photo, picture
from mutators import Mutator, mutate_any, mutate_bytes, mutate_lines
from picture_mutations import damage, make_film, make_map, make_picture
from signal_mutations import SIGNALS, signal

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.limits import LIMITS

PICTURES = [make_picture(np.random.default_rng(seed), 60, 40) for seed in range(24)]
"""In many modes and forms."""
PHOTO = picture(photo(60, 40))
Case = tuple[str, str, str, list[bytes]]
"""Modality, the role and the extension of the part that is mutated, whole files."""


@cache
def list_maps(modality: str, extension: str) -> list[bytes]:
    maps = (make_map(np.random.default_rng(seed), modality, 60, 40) for seed in range(24))
    return [part.data for part in maps if part.extension == extension]


def list_signals() -> dict[str, Case]:
    found = {}
    for name in SIGNALS:
        modality, part = signal(name)
        found[name] = (modality, modality, part.extension, [part.data])
    return found


CASES: dict[str, Case] = {
    "image": ("image", "image", "png", PICTURES),
    "video": ("video", "video", "mp4", [make_film(number, 0) for number in range(4)]),
    "depth png": ("depth", "depth", "depth.png", list_maps("depth", "depth.png")),
    "depth npy": ("depth", "depth", "depth.npy", list_maps("depth", "depth.npy")),
    "normal png": ("normal", "normal", "normal.png", list_maps("normal", "normal.png")),
    "normal npy": ("normal", "normal", "normal.npy", list_maps("normal", "normal.npy")),
    "picture of a map": ("depth", "image", "jpg", PICTURES),
    **list_signals(),
}
WITH_LINES = ("imu csv", "ascii ply", "ply", "pcd")
"""Files that are, or begin with, lines of text."""
SLOW_TO_DECODE = ("video", "mp3", "m4a")


def mutate_file(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Damage a file as disks and networks do."""
    return damage(np.random.default_rng(rng.randrange(2**32)), rng.choice(seeds))


def read(name: str, data: bytes) -> None:
    """Read one file as training and as evaluation do."""
    modality_name, role, extension, _ = CASES[name]
    modality = get_modality(modality_name)
    parts: Mapping[str, Part] = {role: Part(extension, data)}
    if modality_name in ("depth", "normal"):
        chart = Part(f"{modality_name}.npy", list_maps(modality_name, f"{modality_name}.npy")[0])
        parts = {modality_name: chart, "image": PHOTO, **parts}
    for train in (True, False):
        value = modality.read_value(parts, {}, train=train, rng=np.random.default_rng(0))
        assert tuple(value.shape) == tuple(modality.value_shape)
        assert bool(value.isfinite().all())
        assert float(value.abs().max()) <= LIMITS[modality_name].magnitude


def run(name: str, cases: int) -> None:
    mutate: Mutator = mutate_any(mutate_bytes, mutate_file)
    if name in WITH_LINES:
        mutate = mutate_any(mutate_bytes, mutate_file, mutate_lines)
    seeds = [data for data in CASES[name][3] if is_read(name, data)]
    assert seeds

    def surface(data: bytes) -> Any:
        return read(name, data)

    fuzz(f"media {name}", surface, seeds, mutate, cases=cases).require_clean()


def is_read(name: str, data: bytes) -> bool:
    """Whether a whole file can be read: some maps have nothing but NaN."""
    try:
        read(name, data)
    except SampleError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_mutated_media(name: str) -> None:
    run(name, 30 if name in SLOW_TO_DECODE else 60)


@pytest.mark.soak
@pytest.mark.parametrize("name", CASES)
def test_mutated_media_for_hours(name: str) -> None:
    run(name, 4000)
