"""Samples of which bytes and texts are read before the media of any: same batches, few bytes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from data_worlds import open_plan, write
from hypothesis import given
from hypothesis import strategies as st

from onellm_dist.data import reader
from onellm_dist.data.plan import Plan
from onellm_dist.data.reader import Reader, group_samples
from onellm_dist.packed import PackedBatch


def read_first(plan: Plan) -> PackedBatch:
    return Reader(plan.corpus).read(plan.step(0, 1).ranks[0][0])


@pytest.mark.parametrize("size", [1, 3000, 1 << 40])
def test_what_is_prepared_together_changes_no_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    write(tmp_path, "both", ["image", "imu"], 16, broken=[3, 4])
    plan = open_plan(tmp_path, {"both": 1}, pack_llm_tokens=4096, pack_encoder_tokens=20_000)
    expected = read_first(plan)
    assert len(expected.skipped_samples) == 2
    monkeypatch.setattr(reader, "_GROUP_BYTES", size)
    batch = read_first(plan)
    for field in fields(PackedBatch):
        found, wanted = getattr(batch, field.name), getattr(expected, field.name)
        if field.name == "values" or isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        else:
            assert found == wanted


@given(st.lists(st.integers(0, 60), min_size=1, max_size=40), st.integers(1, 100))
def test_groups_hold_every_sample_once_and_as_many_bytes_as_allowed(
    sizes: list[int], limit: int
) -> None:
    """A larger sample is alone; the next one would not fit into a group that ends before it."""
    groups = [list(group) for group in group_samples(sizes, limit)]
    assert [index for group in groups for index in group] == list(range(len(sizes)))
    held = [sum(sizes[index] for index in group) for group in groups]
    assert all(size <= limit or len(group) == 1 for size, group in zip(held, groups, strict=True))
    assert all(
        size + sizes[after[0]] > limit for size, after in zip(held, groups[1:], strict=False)
    )
