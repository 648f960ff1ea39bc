"""Damaged sounds, recordings, clouds and responses: one value everywhere, or words everywhere."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from signal_mutations import SIGNALS, Mutation, mutate, mutations, signal

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.io.damage import DAMAGED_SHARE, collect_damage, note_damage
from onellm_dist.serving.media import read_files
from onellm_dist.shards.build.prepare import prepare_sample
from onellm_dist.shards.build.settings import OPTIONS, BuildSettings
from onellm_dist.shards.sources.base import RawSample

_SETTINGS = BuildSettings(
    **{**{name: option.default for name, option in OPTIONS.items()}, "name": "n", "licence": ""}
)
_MEMORY = 400 << 20


def read(modality: str, part: Part, *, train: bool) -> torch.Tensor | str:
    """What training makes of a file: the model's input, or why there is none."""
    found = get_modality(modality)
    role = next(iter(found.required_parts))
    try:
        return found.read_value({role: part}, {}, train=train, rng=np.random.default_rng(0))
    except SampleError as error:
        caught = error
    assert caught.what and caught.why and caught.do and len(caught.what) < 1000
    assert not re.search(r"0x[0-9a-f]{6,}", caught.what), "an address differs in every process"
    return caught.what


def check_alike(name: str, mutation: Mutation, folder: Path) -> bool:
    """Read a damaged file as training, builder, preview and `generate` do; whether it is used."""
    modality, good = signal(name)
    part = Part(good.extension, mutate(good.data, mutation))
    found = get_modality(modality)
    tracemalloc.start()
    value = read(modality, part, train=False)
    augmented = read(modality, part, train=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < _MEMORY
    path = folder / f"x.{part.extension}"
    path.write_bytes(part.data)
    built = prepare_sample(
        RawSample("x", "x", {part.extension: path}, "a caption"), (modality,), _SETTINGS
    )
    if isinstance(value, str):
        assert augmented == value
        assert built.parts is None and value in built.reason
        with pytest.raises(SampleError) as error:
            read_files([(modality, path)])
        assert value in error.value.what
        return False
    assert isinstance(augmented, torch.Tensor) and torch.isfinite(augmented).all()
    assert value.shape == found.value_shape and torch.isfinite(value).all()
    assert built.parts is not None and built.parts[part.extension] == part.data
    assert torch.equal(read_files([(modality, path)])[modality][0], value)
    role = next(iter(found.required_parts))
    assert found.preview(found.decode({role: part}, {})).mode == "RGB"
    return True


@pytest.mark.parametrize("name", SIGNALS)
def test_a_whole_file_is_used_and_has_no_damage(name: str) -> None:
    modality, part = signal(name)
    with collect_damage() as damage:
        assert isinstance(read(modality, part, train=False), torch.Tensor)
    assert damage == []


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.seconds
def test_damaged_files_are_read_alike_everywhere(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")

    @settings(max_examples=8, deadline=None, derandomize=True)
    @given(mutations)
    def check(mutation: Mutation) -> None:
        check_alike(name, mutation, folder)

    check()


@pytest.mark.soak
@pytest.mark.parametrize("name", SIGNALS)
def test_many_damaged_files_are_read_alike_everywhere(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    used = 0

    @settings(max_examples=3000, deadline=None)
    @given(mutations)
    def check(mutation: Mutation) -> None:
        nonlocal used
        used += check_alike(name, mutation, folder)

    check()
    assert used > 0


def test_generate_says_what_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    modality, part = signal("wav")
    (tmp_path / "a.wav").write_bytes(part.data)
    (tmp_path / "b.wav").write_bytes(part.data[: int(0.9 * len(part.data))])
    read_files([(modality, tmp_path / "a.wav")])
    assert caplog.messages == []
    read_files([(modality, tmp_path / "b.wav")])
    (said,) = caplog.messages
    assert "b.wav is damaged" in said and "of 1.000 s of sound are lost" in said


@pytest.mark.parametrize("descr", ["x", "f(1)", "[x]", "'<f4' + y"])
def test_a_damaged_array_header_is_described_without_addresses(descr: str) -> None:
    """NumPy parses headers as Python, and prints the nodes that it cannot evaluate as objects."""
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': (6, 400), }}\n".encode()
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(9600)
    assert "is not a readable NumPy array" in str(read("imu", Part("imu.npy", data), train=False))


@given(st.floats(0, 1))
def test_damage_is_noted_up_to_a_quarter_and_refused_beyond(share: float) -> None:
    with collect_damage() as damage:
        if share > DAMAGED_SHARE:
            with pytest.raises(SampleError, match="lost"):
                note_damage("lost", share)
        else:
            note_damage("lost", share)
    assert damage == ([] if share > DAMAGED_SHARE else ["lost"])
    note_damage("lost", 0.0)  # nobody listens
