"""Shapes that were computed before are not computed again, and nothing else is different."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from stages_and_modes import STAGES_AND_MODES
from test_counting import count

from onellm_dist.planner import counting
from onellm_dist.planner.meta_results import MetaResults


class Forgetful:
    """Computes everything, each time."""

    def run(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        return func(*args, **kwargs)


@pytest.mark.seconds
@pytest.mark.parametrize(("stage", "mode"), STAGES_AND_MODES)
def test_counts_are_those_of_shapes_that_are_computed_each_time(
    monkeypatch: pytest.MonkeyPatch, stage: str, mode: str
) -> None:
    monkeypatch.setattr(counting, "RESULTS", Forgetful())
    expected = count(stage, mode)
    monkeypatch.setattr(counting, "RESULTS", MetaResults())
    assert [count(stage, mode), count(stage, mode)] == [expected, expected]


def make(*size: int, **keys: Any) -> torch.Tensor:
    return torch.empty(*size, device="meta", **keys)


@pytest.mark.parametrize(
    ("function", "args"),
    [
        (torch.ops.aten.native_layer_norm.default, (make(2, 8), [8], None, None, 1e-5)),
        (torch.ops.aten.mm.default, (make(3, 4), make(4, 5))),
        (torch.ops.aten._to_copy.default, (make(3, 4).t(),)),
        (torch.ops.aten.split.Tensor, (make(4, 4), 2)),
        (torch.ops.aten._unsafe_view.default, (make(4, 4), [16])),
        (torch.ops.aten.add_.Tensor, (make(4), make(4))),
        (torch.ops.aten.unbind.int, (make(2, 3),)),
        (torch.ops.aten.empty_like.default, (make(2, 3).t(),)),
    ],
    ids=lambda value: getattr(value, "__name__", "")[:20],
)
def test_a_repeated_result_has_the_shape_and_the_storage_of_the_first(
    function: Any, args: tuple[Any, ...]
) -> None:
    def describe(out: Any) -> list[Any]:
        own = [x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)]
        tensors = out if isinstance(out, list | tuple) else [out]
        return [
            (
                tuple(x.shape),
                x.stride(),
                x.dtype,
                x.storage_offset(),
                x.untyped_storage().nbytes(),
                x.untyped_storage()._cdata in own,
            )
            for x in tensors
        ]

    results = MetaResults()
    first, second = results.run(function, args, {}), results.run(function, args, {})
    assert type(first) is type(second)
    assert describe(first) == describe(second) == describe(function(*args))
    if not function.is_view and not function._schema.is_mutable:
        assert first is not second


def test_values_on_another_device_decide_each_time() -> None:
    results = MetaResults()
    for index, length in ((torch.tensor([1, 0]), 2), (torch.tensor([1, 1, 1]), 3)):
        out = results.run(torch.ops.aten.repeat_interleave.Tensor, (index,), {})
        assert len(out) == int(index.sum()) and len(index) == length


def test_arguments_of_another_type_are_others() -> None:
    results = MetaResults()
    whole = results.run(torch.ops.aten.full.default, ([2], 1), {"device": "meta"})
    true = results.run(torch.ops.aten.full.default, ([2], True), {"device": "meta"})
    assert whole.dtype != true.dtype
