"""ZeRO-3 gives up the weights that it gave up when it searched for them."""

from __future__ import annotations

import inspect
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from onellm_dist.train.engine.deepspeed.engine import import_deepspeed
from onellm_dist.train.engine.deepspeed.hooks import COORDINATOR, list_parameters
from onellm_dist.train.engine.deepspeed.release import quicken_release

PREFIX = f"_{COORDINATOR}__"
SEARCH = f"{PREFIX}params_to_release"


class Step:
    """What a coordinator knows of a step."""

    def __init__(self, **known: Any) -> None:
        vars(self).update(known)
        self.modules: list[Any] = known.get("modules", [])


@cache
def get_coordinator() -> Any:
    """DeepSpeed's class of coordinators as it comes, whatever this process has changed in it."""
    import_deepspeed()
    from deepspeed.runtime.zero import partitioned_param_coordinator

    spec = spec_from_file_location("untouched", partitioned_param_coordinator.__file__)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, COORDINATOR)


def get_search() -> Any:
    """DeepSpeed's own search, without the cache that never lets go of a module."""
    wrapped = inspect.getclosurevars(vars(get_coordinator())[SEARCH]).nonlocals["func"]
    return wrapped.__wrapped__


def make_quick() -> Any:
    """A class of coordinators that looks up; DeepSpeed's own stays as it is."""
    coordinator = get_coordinator()
    own = {name: vars(coordinator)[name] for name in ("__init__", SEARCH)}
    quick = type(COORDINATOR, (coordinator,), own)
    quicken_release(quick, list_parameters)
    assert vars(quick)[SEARCH] is not vars(coordinator)[SEARCH], "this version is left as it is"
    return quick


def make_step(order: list[int], distance: int, fetched: dict[int, int]) -> Step:
    """Modules of a step; some read the weights of others, some are leaves with modules inside."""
    modules: list[Any] = [nn.Sequential(nn.Linear(1 + i, 2), nn.Linear(2, 1)) for i in range(4)]
    modules += [m for block in modules for m in block]
    modules[1]._z3_leaf = True
    for module in modules:
        module._external_params = {0: modules[9].weight} if module is modules[4] else {}
        module.ds_external_parameters = module._external_params.items
    weights = list({id(p): p for m in modules for p in m.parameters()}.values())
    for number, weight in enumerate(weights):
        weight.ds_id, weight.ds_numel = number, weight.numel()
        weight.ds_persist = number % 5 == 4
    recent = {weight: fetched.get(weight.ds_id, -(10**10)) for weight in weights}
    return Step(
        is_complete_trace=lambda: True,
        modules=modules,
        **{
            f"{PREFIX}submodule_order": tuple(modules[i] for i in order),
            f"{PREFIX}max_reuse_dist_in_numel": distance,
            f"{PREFIX}most_recent_step_id_param_fetched_for": recent,
        },
    )


@given(
    order=st.lists(st.integers(0, 11), min_size=1, max_size=30),
    distance=st.integers(0, 60),
    fetched=st.dictionaries(st.integers(0, 15), st.integers(-2, 30)),
)
def test_what_is_looked_up_is_what_is_searched(
    order: list[int], distance: int, fetched: dict[int, int]
) -> None:
    quick = vars(make_quick())[SEARCH]
    slow = get_search()
    step = make_step(order, distance, fetched)
    for place in range(len(order) + 1):
        for module in step.modules:
            assert quick(step, module, place) == slow(step, module, place)


def test_another_order_is_read_anew() -> None:
    step = make_step([4, 5], 1000, {})
    quick = vars(make_quick())[SEARCH]
    module = step.modules[4]
    assert quick(step, module, 1) == {0, 1} | {p.ds_id for p in [step.modules[9].weight]} - {4}
    setattr(step, f"{PREFIX}submodule_order", (*step.modules[5:6], module))
    assert quick(step, module, 0) == set()


def test_before_a_step_was_recorded_nothing_is_known() -> None:
    step = Step(is_complete_trace=lambda: False)
    with pytest.raises(RuntimeError, match="recorded"):
        vars(make_quick())[SEARCH](step, nn.Linear(1, 1), 0)


def test_a_version_with_other_names_is_left_as_it_is() -> None:
    class Other:
        def __init__(self) -> None:
            self.order: list[nn.Module] = []

    before = dict(vars(Other))
    quicken_release(Other, list_parameters)
    assert dict(vars(Other)) == before
