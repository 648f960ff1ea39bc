"""ZeRO-3's hooks cost the host less, and do the same."""

from __future__ import annotations

import inspect
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from onellm_dist.train.engine.deepspeed import hooks
from onellm_dist.train.engine.deepspeed.engine import import_deepspeed
from onellm_dist.train.engine.deepspeed.hooks import (
    COORDINATOR,
    PROFILER_VARIABLE,
    join_setup,
    list_parameters,
    quicken_hooks,
)

NO_SETUP = "this DeepSpeed's linear layer has no setup_context (0.19.0), and is left as it is"
REPLACED = (
    ("utils.nvtx", "enable_nvtx"),
    ("runtime.zero.partitioned_param_coordinator", "iter_params"),
    ("runtime.zero.linear", "LinearFunctionForZeroStage3"),
)


@pytest.fixture(autouse=True)
def unchanged_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `quicken_hooks` replaces for the whole process comes back after each test."""
    import_deepspeed()
    for module, name in REPLACED:
        found = import_module(f"deepspeed.{module}")
        monkeypatch.setattr(found, name, getattr(found, name))
    coordinator = import_module("deepspeed.runtime.zero.partitioned_param_coordinator")
    kind = getattr(coordinator, COORDINATOR)
    search = f"_{COORDINATOR}__params_to_release"
    if search in vars(kind):
        monkeypatch.setattr(kind, search, vars(kind)[search])


def has_setup() -> bool:
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    return "setup_context" in vars(LinearFunctionForZeroStage3)


def make_hook() -> Any:
    class Hook(torch.autograd.Function):
        @staticmethod
        def forward(outputs: torch.Tensor) -> torch.Tensor:
            return outputs * 2

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
            ctx.factor = 3 * output[0]

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            return gradient * ctx.factor

    return Hook


def test_hooks_are_not_inspected_and_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = nn.Sequential(nn.Identity())
    inspected: list[Any] = []
    module.pre_bwd_fn, module[0].post_bwd_fn = make_hook(), make_hook()
    for _ in range(2):  # again: a second engine in one process
        quicken_hooks(module)
    monkeypatch.setattr(inspect, "signature", inspected.append)
    for hook in (module.pre_bwd_fn, module[0].post_bwd_fn):
        x = torch.ones(2, requires_grad=True)
        out = hook.apply(x)
        out.sum().backward()
        assert out.tolist() == [2, 2] and x.grad is not None and x.grad.tolist() == [6, 6]
    assert not inspected


@pytest.mark.parametrize("shape", [(4,), (5, 4), (2, 3, 4)])
@pytest.mark.parametrize("bias", [False, True])
def test_the_linear_layer_of_zero_3_computes_the_same(shape: tuple[int, ...], bias: bool) -> None:
    from deepspeed.runtime.zero import linear

    if len(shape) == 1 and not has_setup():
        pytest.skip(f"{NO_SETUP}: it has no gradient of a single row")
    found = []
    joined = join_setup(linear.LinearFunctionForZeroStage3).apply
    for function in (joined, torch.nn.functional.linear):
        generator = torch.Generator().manual_seed(0)
        x, weight, own = (
            torch.randn(size, generator=generator, requires_grad=True)
            for size in (shape, (3, 4), (3,))
        )
        out = function(x, weight, own if bias else None)
        inputs = [x, weight, own] if bias else [x, weight]
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_parameters_of_others_that_a_module_reads_are_listed_when_they_come() -> None:
    module: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    other = nn.Parameter(torch.ones(1))
    assert [*list_parameters(module)] == []
    assert [*list_parameters(module, recurse=True)] == [*module.parameters()]
    module._external_params = {id(other): other}
    assert [*list_parameters(module)] == [other]
    assert [*list_parameters(module, True)] == [*module.parameters(), other]


@pytest.mark.parametrize("profiled", [False, True])
def test_functions_are_marked_for_a_profiler_alone(
    monkeypatch: pytest.MonkeyPatch, profiled: bool
) -> None:
    from deepspeed.utils import nvtx

    monkeypatch.setattr(nvtx, "enable_nvtx", True)
    monkeypatch.delenv(PROFILER_VARIABLE, raising=False)
    if profiled:
        monkeypatch.setenv(PROFILER_VARIABLE, "1")
    quicken_hooks(nn.Identity())
    assert nvtx.enable_nvtx == profiled


def test_deepspeed_calls_what_replaces_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the installed version; under other names the hooks would be as slow as ever."""
    from deepspeed.runtime.zero import linear, partitioned_param_coordinator

    listed: list[Any] = []

    def list_and_tell(module: Any, recurse: bool = False) -> Any:
        listed.append(module)
        return list_parameters(module, recurse)

    monkeypatch.setattr(hooks, "list_parameters", list_and_tell)
    can_join = has_setup()
    own = [getattr(import_module(f"deepspeed.{module}"), name) for module, name in REPLACED]
    quicken_hooks(nn.Identity())
    new = [getattr(import_module(f"deepspeed.{module}"), name) for module, name in REPLACED]
    assert new[1] is list_and_tell and issubclass(new[2], own[2])
    assert (new[2] is not own[2]) == can_join, NO_SETUP

    coordinator: Any = partitioned_param_coordinator.PartitionedParameterCoordinator
    fetch = coordinator._fetch_sub_module_impl
    assert fetch.__globals__ is vars(partitioned_param_coordinator)
    assert "iter_params" in fetch.__code__.co_names
    module: Any = nn.Identity()
    module.ds_id = 0
    # It asks for the rank, and there is no process group.
    monkeypatch.setattr(partitioned_param_coordinator, "print_rank_0", lambda *_, **__: None)
    trace = SimpleNamespace(
        is_complete_trace=lambda: False,
        _PartitionedParameterCoordinator__active_backward_submodules={},
    )
    coordinator.release_sub_module(trace, module, forward=True)
    assert listed and {*listed} == {module}
    weight = nn.Parameter(torch.ones(2, 3))
    out = linear.zero3_linear_wrap(torch.ones(1, 3), weight)
    assert type(out.grad_fn).__name__ == f"{new[2].__name__}Backward"


def test_a_version_without_the_names_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in REPLACED:
        monkeypatch.delattr(import_module(f"deepspeed.{module}"), name)
    model: Any = nn.Identity()
    model.pre_bwd_fn = make_hook()
    quicken_hooks(model)
    for module, name in REPLACED:
        assert not hasattr(import_module(f"deepspeed.{module}"), name)
    assert model.pre_bwd_fn.__name__ == "Joined"
