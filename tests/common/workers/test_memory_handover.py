"""Objects with tensors pass between processes unchanged, and without a file."""

from __future__ import annotations

import contextlib
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onellm_dist.common.errors import MachineError, UsageError
from onellm_dist.common.workers.handover import make_pair, receive, send
from onellm_dist.packed import PackedBatch

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8)


def pass_on(value: Any) -> Any:
    ours, theirs = make_pair()
    with ours, theirs:
        send(ours, value)
        return receive(theirs)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.booleans()),
        max_size=5,
    ),
    st.dictionaries(st.text(max_size=5), st.integers()),
)
def test_what_is_sent_arrives(shapes: list[tuple[torch.dtype, list[int], bool]], more: Any) -> None:
    tensors = []
    for number, (dtype, shape, turned) in enumerate(shapes):
        tensor = (torch.randn(shape) * 50 + number).to(dtype)
        tensors.append(tensor.transpose(0, -1) if turned and shape else tensor)
    found, rest = pass_on((tensors, more))
    assert rest == more and len(found) == len(tensors)
    for one, other in zip(tensors, found, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def test_what_arrives_may_be_written_to_and_outlives_its_sockets() -> None:
    found = pass_on({"a": torch.zeros(5)})
    found["a"] += 1
    assert found["a"].sum() == 5


def test_what_is_kept_of_a_step_keeps_neither_media_nor_descriptors() -> None:
    """The trainer keeps every micro-batch of a step without its media."""
    before = len(os.listdir("/proc/self/fd"))
    memory = get_mapped_bytes()
    kept, ids, media = [], torch.arange(4096), torch.ones(1, 3, 512, 512)
    for _ in range(30):
        batch = PackedBatch(ids, ids + 1, (4096,), (("image",),), {"image": media}, torch.ones(1))
        found = pass_on(batch).to("cpu")
        assert torch.equal(found.values["image"], media)
        kept.append(replace(found, values={}))
        del found
    assert len(os.listdir("/proc/self/fd")) == before
    assert get_mapped_bytes() - memory < 2 * media.nbytes
    assert all(torch.equal(b.input_ids, ids) and torch.equal(b.labels, ids + 1) for b in kept)


def get_mapped_bytes() -> int:
    """Bytes of messages that this process holds."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    spans = [line.split()[0].split("-") for line in maps if "memfd:onellm" in line]
    return sum(int(end, 16) - int(start, 16) for start, end in spans)


def test_errors_keep_their_parts() -> None:
    for kind in (UsageError, MachineError):
        error = pass_on(kind("what", "why", "do"))
        assert type(error) is kind and (error.what, error.why, error.do) == ("what", "why", "do")


def test_the_end_of_the_other_side_is_noticed() -> None:
    ours, theirs = make_pair()
    with theirs:
        ours.close()
        with pytest.raises(EOFError):
            receive(theirs)
        with pytest.raises(BrokenPipeError):
            send(theirs, 1)


def test_no_descriptor_left_is_an_error_and_no_wait() -> None:
    ours, theirs = make_pair()
    with ours, theirs:
        send(ours, torch.zeros(3))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(map(int, os.listdir("/proc/self/fd")))
        filled = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(used + 1, soft), hard))
        try:
            with contextlib.suppress(OSError):
                while True:
                    filled.append(os.dup(0))
            with pytest.raises(OSError, match="Too many open files"):
                receive(theirs)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for descriptor in filled:
                os.close(descriptor)
