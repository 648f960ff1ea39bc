"""Values gathered in a micro-batch's tensors, and the allocator of those who read them."""

from __future__ import annotations

import platform

import pytest
import torch

from onellm_dist.common.workers.allocator import keep_freed_memory
from onellm_dist.data.value_rows import ValueRows
from onellm_dist.modalities import Modality, get_modality

_CHOSEN: dict[str, Modality] = {name: get_modality(name) for name in ("image", "imu", "fmri")}


def make_value(name: str, number: int) -> torch.Tensor:
    return torch.full(tuple(_CHOSEN[name].value_shape), number, dtype=_CHOSEN[name].loader_dtype)


def test_rows_are_the_stack_of_the_values_in_their_order() -> None:
    samples: list[dict[str, list[torch.Tensor]]] = [
        {"image": [make_value("image", 1), make_value("image", 2)]},
        {},
        {"fmri": [make_value("fmri", 3)], "image": [make_value("image", 4)]},
    ]
    rows = ValueRows(_CHOSEN, ["image", "image", "fmri", "image"])
    for values in samples:
        rows.add(values)
    found = rows.finish()
    assert list(found) == list(_CHOSEN)
    assert torch.equal(found["image"], torch.stack([make_value("image", n) for n in (1, 2, 4)]))
    assert torch.equal(found["fmri"], make_value("fmri", 3)[None])
    assert found["imu"].shape == (0, *_CHOSEN["imu"].value_shape)
    assert {name: value.dtype for name, value in found.items()} == {
        "image": torch.uint8,
        "imu": torch.float32,
        "fmri": torch.float32,
    }


def test_more_or_fewer_spans_than_planned_never_pass() -> None:
    rows = ValueRows(_CHOSEN, ["image", "image"])
    rows.add({"image": [make_value("image", 1)]})
    with pytest.raises(RuntimeError, match="spans planned"):
        rows.finish()
    with pytest.raises(IndexError):
        rows.add({"image": [make_value("image", 2)] * 2})


def test_the_c_library_takes_the_thresholds() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("the C library is not glibc")
    assert keep_freed_memory()
