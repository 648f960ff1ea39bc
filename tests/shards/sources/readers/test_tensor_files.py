"""Tensors that torch.save wrote: equal values, and hostile files that cost nothing but words."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onellm_dist.modalities.limits import LIMITS, Limits
from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers import clouds
from onellm_dist.shards.sources.readers.clouds import TensorCloud
from onellm_dist.shards.sources.readers.tensor_files import read_tensor

_HUGE = 1 << 40


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def archive(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in members.items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def describe(count: int, shape: tuple[int, ...], strides: tuple[int, ...], start: int = 0) -> bytes:
    """The pickle of a tensor of fp32 with these numbers, as torch writes it."""

    def number(value: int) -> bytes:
        data = value.to_bytes(9, "little", signed=True)
        return b"\x8a\x09" + data

    def sizes(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    )
    head = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(count) + b"tQ"
    tail = b"\x89ccollections\nOrderedDict\n)RtR."
    return head + number(start) + sizes(shape) + sizes(strides) + tail


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4),
    dtype=st.sampled_from(
        [torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.uint8, torch.int64]
    ),
    turned=st.booleans(),
    part=st.booleans(),
)
def test_values_are_those_that_torch_reads(
    shape: list[int], dtype: torch.dtype, turned: bool, part: bool
) -> None:
    value = (torch.randn(shape) * 50).abs().to(dtype)
    value = value.movedim(0, -1) if turned and shape else value
    value = value[1:] if part and shape and shape[0] > 1 and not turned else value
    data = saved(torch.nn.Parameter(value) if value.is_floating_point() and part else value)
    expected = torch.load(io.BytesIO(data), weights_only=True).detach()
    np.testing.assert_array_equal(
        read_tensor(data),
        (expected.float() if dtype == torch.bfloat16 else expected).numpy(),
        strict=True,
    )


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def flip(data: bytes) -> bytes:
    at = data.index(b"archive/data/0") + 100
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


_NUMBERS = bytes(4 * 60)
_ONE = describe(60, (6, 10), (10, 1))
_HOSTILE: dict[str, Callable[[], bytes]] = {
    "code": lambda: archive({"data.pkl": pickle.dumps(_Evil()), "data/0": _NUMBERS}),
    "code in a bare pickle": lambda: pickle.dumps(_Evil()),
    "a storage of 4 TiB": lambda: archive(
        {"data.pkl": describe(_HUGE, (6, _HUGE // 6), (1, 6)), "data/0": _NUMBERS}
    ),
    "a negative storage": lambda: archive({"data.pkl": describe(-60, (6, 10), (10, 1))}),
    "a shape beyond the storage": lambda: archive(
        {"data.pkl": describe(60, (6, _HUGE), (_HUGE, 1)), "data/0": _NUMBERS}
    ),
    "one number, repeated": lambda: archive(
        {"data.pkl": describe(60, (6, _HUGE), (0, 0)), "data/0": _NUMBERS}
    ),
    "a start beyond the storage": lambda: archive(
        {"data.pkl": describe(60, (6, 10), (10, 1), start=1), "data/0": _NUMBERS}
    ),
    "a negative stride": lambda: archive(
        {"data.pkl": describe(60, (6, 10), (-10, 1)), "data/0": _NUMBERS}
    ),
    "a memo of 16 GiB": lambda: archive({"data.pkl": b"Nr\xff\xff\xff\x7f]" + b"\x85" * 90 + b"."}),
    "bytes of 16 GiB": lambda: archive(
        {"data.pkl": b"\x8e" + (2**34).to_bytes(8, "little") + b"."}
    ),
    "nested": lambda: archive({"data.pkl": b"N" + b"\x85" * 100_000 + b"."}),
    "a compressed bomb": lambda: archive(
        {"data.pkl": describe(1 << 24, (6, 1 << 21), (1 << 21, 1)), "data/0": bytes(1 << 26)},
        zipfile.ZIP_DEFLATED,
    ),
    "many members": lambda: archive({"data.pkl": _ONE, **{f"x/{i}": b"" for i in range(2000)}}),
    "two descriptions": lambda: archive({"data.pkl": _ONE, "b/data.pkl": _ONE, "data/0": _NUMBERS}),
    "no storage": lambda: archive({"data.pkl": _ONE}),
    "big-endian": lambda: archive({"data.pkl": _ONE, "data/0": _NUMBERS, "byteorder": b"big"}),
    "cut short": lambda: saved(torch.zeros(6, 10))[:-30],
    "a flipped bit": lambda: flip(saved(torch.zeros(6, 10))),
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("what", _HOSTILE)
def test_hostile_files_end_in_words(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    path.write_bytes(_HOSTILE[what]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadSampleError, match=r"^unreadable .pt: x.pt: \w") as error:
        TensorCloud(path, "x.pt").read_bytes()
    assert " 0x" not in error.value.what and len(error.value.what) < 400
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KiB
    assert not (tmp_path / "owned").exists()


def test_the_description_stands_for_what_torch_writes() -> None:
    """The hostile files differ from a good one in the numbers that they name alone."""
    values = np.arange(60, dtype="<f4")
    data = archive({"data.pkl": describe(60, (6, 10), (10, 1)), "data/0": values.tobytes()})
    np.testing.assert_array_equal(read_tensor(data), values.reshape(6, 10))
    assert struct.unpack("<f", read_tensor(data)[0, 1].tobytes()) == (1.0,)


def test_a_cloud_has_the_limits_of_its_modality(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.pt").write_bytes(saved(torch.zeros(6, 100)))
    assert np.load(io.BytesIO(TensorCloud(tmp_path / "x.pt", "x.pt").read_bytes())).shape == (
        100,
        6,
    )
    monkeypatch.setattr(clouds, "LIMITS", {**LIMITS, "point": Limits(points=99)})
    with pytest.raises(Exception, match="100 points; the limits are 1 to 99"):
        TensorCloud(tmp_path / "x.pt", "x.pt").read_bytes()
