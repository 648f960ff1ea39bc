"""One rank of any number, without memory and without the others: torch's fake process group.

The engine's own code wraps the model and runs micro-batches. Tensors have shapes alone, and
collectives end at once. What is measured is what a real rank would ask for: the bytes of its
collectives, and the bytes that it holds.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import distributed, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from onellm_dist.model import attention, onellm
from onellm_dist.model.kernels.counted import compute_counted
from onellm_dist.model.llm import call as llm_call
from onellm_dist.model.llm.attention import build_packed_mask
from onellm_dist.packed import PackedBatch
from onellm_dist.planner.counting import list_tensors

COLLECTIVES = "c10d"


@dataclass
class FakeStep:
    """What one rank asked for."""

    collectives: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Name of a collective to the bytes that it gave to or took from this rank, whole tensors."""
    frozen_bytes: int = 0
    """Bytes of the rank's share of weights that do not train."""
    trained_elements: int = 0
    """Elements of trained weights of which the rank holds the fp32 weight and the state."""


class _CollectiveBytes(TorchDispatchMode):
    """Adds up the larger side of each collective: what is gathered, or what is reduced."""

    def __init__(self, found: dict[str, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == COLLECTIVES:
            sides = [
                sum(x.nbytes for x in list_tensors(a if isinstance(a, list) else [a]))
                for a in args
                if isinstance(a, list | torch.Tensor)
            ]
            self._found[func._opname] += max(sides, default=0)
        return out


class _FakeFactories(TorchFunctionMode):
    """Makes what `torch.empty` makes on a device without memory."""

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self._fake = fake

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty:
            with self._fake:
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _NoWeights:
    """A `WeightSource` of shapes."""

    def __init__(self, model: nn.Module) -> None:
        self._shapes = {name: p.shape for name, p in model.named_parameters()}

    def rows(self, name: str, first: int, end: int) -> torch.Tensor:
        shape = self._shapes[name]
        return torch.empty((end - first, *shape[1:]) if shape else ())


@contextmanager
def join_fake_ranks(world_size: int, rank: int = 0) -> Iterator[None]:
    """Make this process one rank of a fake process group."""
    distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        distributed.destroy_process_group()


def run_fake_step(
    wrap: Callable[[nn.Module, Any], Any], model: nn.Module, batch: PackedBatch, micro_batches: int
) -> FakeStep:
    """Wrap a model on the meta device and run the forward and backward passes of one step.

    Args:
        wrap: gives the engine of the model with a `WeightSource`.
        model: prepared for its stage, on the meta device.
        batch: the micro-batch, on the meta device.
        micro_batches: how often it is run.
    """
    fake, found = FakeTensorMode(allow_non_fake_inputs=True), FakeStep()
    with _FakeFactories(fake):
        engine = wrap(model, _NoWeights(model))
    own = {id(p) for p in model.parameters() if p.requires_grad}
    found.frozen_bytes = sum(
        getattr(p, "_local_tensor", p).nbytes for p in model.parameters() if id(p) not in own
    )
    found.trained_elements = sum(r.length for r in engine.ranges())
    with fake, _shapes_alone():
        for buffered in model.modules():
            for name, buffer in buffered.named_buffers(recurse=False):
                buffered._buffers[name] = _fake(buffer)
        values = {name: _fake(value) for name, value in batch.values.items()}
        packed = replace(
            batch,
            values=values,
            input_ids=_fake(batch.input_ids),
            labels=_fake(batch.labels),
            weights=_fake(batch.weights),
            supervised=None if batch.supervised is None else _fake(batch.supervised),
        )
        with _CollectiveBytes(found.collectives):
            for number in range(micro_batches):
                loss, _, _ = engine.forward(packed, last=number == micro_batches - 1)
                engine.backward(loss, 100)
    return found


def _fake(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


@contextmanager
def _shapes_alone() -> Iterator[None]:
    """Leave out what looks at values, and count attention as the planner does."""

    def build_mask(lengths: Any) -> Any:
        with torch._C._DisableTorchDispatch():
            return build_packed_mask(lengths)

    with ExitStack() as stack:
        for owner, name, value in (
            (onellm, "check_tokens", lambda *_: None),
            (attention, "select_kernel", lambda *_, **__: compute_counted),
            (llm_call, "build_packed_mask", build_mask),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield
