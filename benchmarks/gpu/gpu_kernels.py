"""Where the time of a micro-batch goes: kernels by part of the model and by kind."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import ExitStack
from typing import Any

import torch
from gpu_record import Record, synchronise
from gpu_steps import STAGE1, run_step
from gpu_workload import Workload
from torch.profiler import ProfilerActivity, profile, record_function

PARTS = ("encoder", "tokenizers", "projectors", "upm", "llm")
PREFIX = "part "
KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("flash", "fmha", "sdpa", "mha"),
    "matrix product": ("gemm", "cutlass", "nvjet", "cublas", "wgmma", "xmma"),
    "convolution": ("conv", "cudnn"),
    "copy": ("memcpy", "memset"),
    "compiled": ("triton",),
    "norm or reduction": ("reduce", "norm", "softmax"),
}
MOST_NAMES = 60


def get_kind(name: str) -> str:
    """What a kernel does, by its name."""
    lower = name.lower()
    return next(
        (kind for kind, words in KINDS.items() if any(word in lower for word in words)),
        "elementwise and others",
    )


def measure_kernels(record: Record, work: Workload) -> None:
    """Trace a micro-batch of stage I."""
    model, on_gpu = work.build(STAGE1), work.device.type == "cuda"
    batch = work.make_batch(work.make_stage1()[0])
    run_step(model, [batch], work)
    synchronise()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with ExitStack() as stack:
        for name in PARTS:
            mark_part(stack, model.get_submodule(name), name)
        profiler = stack.enter_context(profile(activities=activities))
        started = time.perf_counter()
        run_step(model, [batch], work)
        synchronise()
        wall = time.perf_counter() - started
    by_part: dict[str, float] = defaultdict(float)
    by_kind: dict[str, float] = defaultdict(float)
    by_name: dict[str, float] = defaultdict(float)
    launches = 0
    for event in profiler.events() or ():
        work_items = [(k.name, k.duration) for k in event.kernels]
        if not on_gpu and not event.name.startswith(PREFIX):
            work_items = [(event.name, event.self_cpu_time_total)]
        for name, microseconds in work_items:
            launches += 1
            by_part[find_part(event)] += microseconds / 1e3
            by_kind[get_kind(name)] += microseconds / 1e3
            by_name[name[:100]] += microseconds / 1e3
    record.add(
        "kernels of a micro-batch, ms",
        wall=1e3 * wall,
        busy=sum(by_kind.values()),
        launches=launches,
        **sort_by_value(by_kind),
    )
    record.add("kernels by part (forward; backward is `outside`), ms", **sort_by_value(by_part))
    longest = dict(list(sort_by_value(by_name).items())[:MOST_NAMES])
    record.add("kernels by name, ms", **longest)


def mark_part(stack: ExitStack, module: torch.nn.Module, name: str) -> None:
    """Let the profiler see where a part of the model begins and ends."""
    running: list[Any] = []

    def begin(*_: Any) -> None:
        running.append(record_function(PREFIX + name))
        running[-1].__enter__()

    def end(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    parts = [*module.children()] if isinstance(module, torch.nn.ModuleDict) else [module]
    for part in parts:
        stack.callback(part.register_forward_pre_hook(begin).remove)
        stack.callback(part.register_forward_hook(end).remove)


def find_part(event: Any) -> str:
    """The innermost part of the model within which an operation ran."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return str(event.name.removeprefix(PREFIX))
        event = event.cpu_parent
    return "outside"


def sort_by_value(values: dict[str, float]) -> dict[str, float]:
    """Largest first."""
    return dict(sorted(values.items(), key=lambda item: -item[1]))
