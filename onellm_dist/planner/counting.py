"""Counts one micro-batch of the real model on the meta device: operations, bytes, memory.

Every ATen operation of forward, recomputation and backward passes a dispatch mode, with shapes
alone. It sees which storages live, so that what forward keeps for backward is counted whoever keeps
it: autograd, or a recomputation's cache.
"""

from __future__ import annotations

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers.modeling_layers import GradientCheckpointingLayer

from onellm_dist.model.kernels.counted import BACKWARD, FORWARD, count_flops
from onellm_dist.model.losses.preference import list_llms
from onellm_dist.model.quantised.linear import list_quantised
from onellm_dist.packed import PackedBatch
from onellm_dist.planner.meta_results import MetaResults
from onellm_dist.planner.module_labels import ModuleLabels
from onellm_dist.train.engine.description import WeightUses

ATTENTION = frozenset({FORWARD, BACKWARD})
FLOAT8_PRODUCT = "aten::_scaled_mm"
_NO_WORK = frozenset(
    f"aten::{name}"
    for name in (
        "_unsafe_view",
        "detach",
        "alias",
        "lift_fresh",
        "t",
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "resize_",
    )
)
"""Operations that move no bytes, beside those whose schema makes them views."""


RESULTS = MetaResults()
"""Of all counts of this process, until a training that has planned its start forgets them."""


class OperationKey(NamedTuple):
    """An operation of a micro-batch; packs of any size have the same ones."""

    part: str
    """Part of the model, by its name in `ModuleLabels`."""
    phase: str
    """`forward`, `recompute` or `backward`."""
    name: str
    """Name of the ATen operation."""
    occurrence: int
    """How many operations of the same part, phase and name ran before it."""


class Work(NamedTuple):
    """What an operation does."""

    flops: float
    bytes: float
    shape: tuple[int, ...]
    """Rows, columns and summed dimension of a matrix product; () for others."""


@dataclass
class PackCount:
    """What one micro-batch does and keeps, on one rank with complete weights."""

    operations: dict[OperationKey, Work] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Calls of ATen operations by phase, views and empty ones included: the host makes them all."""
    kept: dict[str, int] = field(default_factory=dict)
    """Part to bytes of activations that live when forward ends, by where they were made."""
    peak: int = 0
    """Most bytes of activations and their gradients that live at a time; parameters, their
    gradients and the micro-batch itself are not counted."""
    modules: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    """Calls of modules by phase."""
    uses: WeightUses = field(default_factory=lambda: WeightUses(0, 0, 0, 0, 0, 0))
    """Weights that were read."""


class _Storages:
    """Bytes of the storages that live, by the part that made them."""

    def __init__(self, known: set[int]) -> None:
        self._known = known  # parameters, buffers and inputs: kept alive by others
        self._live: dict[int, tuple[str, int]] = {}
        self.by_part: dict[str, int] = defaultdict(int)
        self.total = 0
        self.peak = 0

    def add(self, tensor: torch.Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live or key in self._known:
            return
        size = storage.nbytes()
        self._live[key] = part, size
        self.by_part[part] += size
        self.total += size
        self.peak = max(self.peak, self.total)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        part, size = self._live.pop(key)
        self.by_part[part] -= size
        self.total -= size


class _OperationCounter(TorchDispatchMode):
    """Writes what runs into a PackCount."""

    def __init__(self, labels: ModuleLabels, storages: _Storages, found: PackCount) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation
        self._labels = labels
        self._storages = storages
        self._found = found
        self._occurrences: dict[tuple[str, str, str], int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = RESULTS.run(func, args, kwargs)
        phase = get_phase()
        self._found.calls[phase] += 1
        outputs = [x for x in list_tensors(out) if x.is_meta]
        part = self._labels.current
        for tensor in outputs:
            self._storages.add(tensor, part)
        name = func._schema.name
        if name in _NO_WORK or func.is_view:
            return out
        inputs = [*list_tensors(args), *list_tensors(kwargs.values())]
        moved = sum(map(count_bytes, (*inputs, *outputs)))
        if moved and (outputs or any(x.is_meta for x in inputs)):
            place = part, phase, name
            key = OperationKey(*place, self._occurrences[place])
            self._occurrences[place] += 1
            flops, shape = count_products(func, args, kwargs, out, inputs)
            self._found.operations[key] = Work(flops, moved, shape)
        return out


def list_tensors(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among arguments or results of an operation, and in their lists."""
    if isinstance(values, torch.Tensor):
        yield values
    elif values is not None and not isinstance(values, bool | int | float | str):
        for value in values:
            if isinstance(value, torch.Tensor):
                yield value
            elif isinstance(value, list | tuple):
                yield from (x for x in value if isinstance(x, torch.Tensor))


def get_phase() -> str:
    """What runs now: `forward`, `recompute` (forward again, within backward) or `backward`."""
    if torch._C._current_autograd_node() is None:
        return "forward"
    return "recompute" if torch.is_grad_enabled() else "backward"


def count_bytes(tensor: torch.Tensor) -> int:
    """Bytes that reading or writing a tensor moves; expanded dimensions are read once."""
    if not tensor.numel():
        return 0
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride:
            size *= length
    return size


def count_products(
    func: Any, args: Any, kwargs: Any, out: Any, inputs: list[torch.Tensor]
) -> tuple[float, tuple[int, ...]]:
    """FLOPs of an operation, and the shape of a matrix product."""
    name = func._schema.name
    if name in ATTENTION:
        q, v = (inputs[1], inputs[3]) if name == BACKWARD else (inputs[0], inputs[2])
        return count_flops(q, v, args[-1], backward=name == BACKWARD), ()
    packet = func._overloadpacket
    if packet not in flop_registry:
        return 0.0, ()
    flops = float(flop_registry[packet](*args, **kwargs, out_val=out))
    if name not in ("aten::mm", "aten::addmm", FLOAT8_PRODUCT):
        return flops, ()
    factors = [x for x in inputs if x.dim() == 2]
    left, right = factors[:2] if name == FLOAT8_PRODUCT else factors[-2:]
    return flops, (*left.shape, right.shape[1])


def count_pack(model: Any, batch: PackedBatch) -> PackCount:
    """Run forward and backward of one micro-batch on the meta device, and count.

    Args:
        model: a OneLLM on the meta device, prepared for its stage.
        batch: a micro-batch on the meta device.
    """
    found = PackCount()
    labels = ModuleLabels(model)
    tensors = (*model.parameters(), *model.buffers(), *batch.values.values())
    tensors += tuple(x for layer in list_quantised(model).values() for x in layer.list_held())
    tensors += (batch.input_ids, batch.labels, batch.weights)
    if batch.supervised is not None:
        tensors += (batch.supervised,)
    storages = _Storages({x.untyped_storage()._cdata for x in tensors})
    with (
        labels.follow(),
        drop_gradients(model),
        count_uses(model, found.modules) as uses,
        _OperationCounter(labels, storages, found),
    ):
        loss = model(packed=batch).loss
        found.kept = {part: size for part, size in storages.by_part.items() if size}
        loss.backward()
    found.peak = storages.peak
    found.uses = WeightUses(**uses)
    return found


@contextmanager
def drop_gradients(model: nn.Module) -> Iterator[None]:
    """Drop each parameter's gradient when it is complete: engines keep them in their own form."""
    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(_drop_gradient)
                stack.callback(handle.remove)
        yield


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


def list_units(model: Any) -> list[nn.Module]:
    """Transformer blocks, embeddings and heads: what engines gather as one."""
    blocks = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    llms = list_llms(model)
    ends = [end for x in llms for end in (x.get_input_embeddings(), x.get_output_embeddings())]
    return [*blocks, *ends]


def measure_frozen_blocks(model: Any) -> float:
    """Share of the modules in transformer blocks whose class has no block that trains."""
    modules, trained = Counter[type[Any]](), set[type[Any]]()
    for block in model.modules():
        if not isinstance(block, GradientCheckpointingLayer):
            continue
        modules[type(block)] += sum(1 for _ in block.modules())
        if any(parameter.requires_grad for parameter in block.parameters()):
            trained.add(type(block))
    frozen = sum(count for kind, count in modules.items() if kind not in trained)
    return frozen / max(1, modules.total())


@contextmanager
def count_uses(model: nn.Module, calls: dict[str, int]) -> Iterator[dict[str, float]]:
    """Count the weights that modules read, as fields of `WeightUses`.

    Args:
        model: the model.
        calls: receives the number of calls of modules by phase.
    """
    uses = dict.fromkeys(WeightUses.__dataclass_fields__, 0.0)
    inside = {id(p) for unit in list_units(model) for p in unit.parameters()}
    outside = [p for p in model.parameters() if id(p) not in inside]
    uses["loose"] = float(sum(p.numel() for p in outside))
    uses["loose_trained"] = float(sum(p.numel() for p in outside if p.requires_grad))

    def add(module: nn.Module, _: Any, output: Any) -> None:
        phase = get_phase()
        calls[phase] += 1
        passes = any(x.requires_grad for x in tree_leaves(output) if isinstance(x, torch.Tensor))
        for parameter in module.parameters(recurse=False):
            owner = "trained" if parameter.requires_grad else "frozen"
            kinds = ["recomputed"] if phase == "recompute" else ["forward", "backward"]
            for kind in kinds if passes else kinds[:1]:
                uses[f"{owner}_{kind}"] += parameter.numel()
                if kind != "recomputed" and id(parameter) not in inside:
                    uses["loose_reads"] += parameter.numel()
                    uses["loose_trained_reads"] += parameter.numel() * parameter.requires_grad

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_hook(add).remove)
        yield uses
