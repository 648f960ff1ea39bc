"""How long this rank itself computes in forward, apart from the engine's collectives.

In a synchronous step all ranks take equally long: the fast ones wait for the slow one inside of
collectives. Engines gather weights in the hooks of modules, so that hooks around those separate
the two: what runs between them is the model's own work, what runs within is the engine's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


class HostMark:
    """A moment of the host, which a CPU computes on."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def seconds_until(self, later: HostMark) -> float:
        return later._at - self._at


class DeviceMark:
    """A moment of a GPU's current stream: it waits there for the weights that it needs."""

    def __init__(self) -> None:
        self._event = torch.cuda.Event(enable_timing=True)
        self._event.record()

    def seconds_until(self, later: DeviceMark) -> float:
        return float(self._event.elapsed_time(later._event)) / 1000


class ForwardClock:
    """Measures the forward passes of some steps.

    Args:
        model: the model inside the engine, after the engine has added its hooks.
        device: where it computes.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model = model
        self._make_mark: type[HostMark] | type[DeviceMark] = (
            DeviceMark if device.type == "cuda" else HostMark
        )
        self._marks: list[tuple[Any, bool]] = []
        self._active = False

    @contextmanager
    def measure(self) -> Iterator[None]:
        """Measure the forward passes within the context, which `run` marks."""
        self._marks.clear()
        with ExitStack() as stack:
            for module in self._model.modules():
                for hook, prepend in ((self._end_own, True), (self._end_engine, False)):
                    pre = module.register_forward_pre_hook(hook, prepend=prepend)
                    post = module.register_forward_hook(hook, prepend=prepend)
                    stack.callback(pre.remove)
                    stack.callback(post.remove)
            yield

    @contextmanager
    def run(self) -> Iterator[None]:
        """A forward pass: what runs outside of one (a recomputation) does not count."""
        self._active = True
        self._mark(is_own=False)
        try:
            yield
        finally:
            self._active = False

    def read(self) -> float:
        """Seconds of the model's own work; the device must have done all of it."""
        own: float = sum(
            before.seconds_until(mark)
            for (before, _), (mark, is_own) in zip(self._marks, self._marks[1:], strict=False)
            if is_own
        )
        self._marks.clear()
        return own

    def _mark(self, *, is_own: bool) -> None:
        if self._active:
            self._marks.append((self._make_mark(), is_own))

    def _end_own(self, *_: Any) -> None:
        self._mark(is_own=True)

    def _end_engine(self, *_: Any) -> None:
        self._mark(is_own=False)
