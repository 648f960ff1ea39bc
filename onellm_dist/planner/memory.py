"""What a rank holds on its device at the fullest moment of a step, by part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from onellm_dist.config.schema import EngineSection
from onellm_dist.model.quantised.linear import WEIGHT_BYTES, list_quantised
from onellm_dist.planner.counting import PackCount, list_units
from onellm_dist.planner.hardware import GIGA, GpuKind, load_assumptions
from onellm_dist.planner.module_labels import GLUE
from onellm_dist.train.engine.description import BlockSize, EngineDescription

PRECISION_BYTES = {"bf16": 2, "fp32": 4}
"""`train.precision` to bytes of a weight that the model computes with."""
HELD_ON_GPU = 3
"""Micro-batches on a GPU at once: the one at work, the next one, and one that is being copied."""
HELD_ON_PROCESSORS = 2
"""The one at work, and the next one."""
SHOWN_PARTS = {
    "encoder": "encoder",
    "modality": "tokenizers and projections",
    "upm": "UPM",
    "llm": "LLM",
    "embedding": "LLM",
    "head": "head and loss",
    GLUE: "between modules",
}
"""First word of a part's label to what the plan calls it."""


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model that is prepared for its stage."""

    frozen: int
    trainable: int
    largest_unit: int
    """Parameters of the largest module that engines gather at once."""
    quantised: int = 0
    """Frozen weights that are quantised; `frozen` does not count them."""
    stacks: tuple[tuple[BlockSize, ...], ...] = ()
    """The blocks of each stack of transformer blocks; quantised weights are in none."""

    @property
    def total(self) -> int:
        """All parameters, frozen, trainable and quantised."""
        return self.frozen + self.trainable + self.quantised

    def to_json(self) -> dict[str, int]:
        """The numbers, without the sizes of single blocks."""
        numbers = {k: v for k, v in vars(self).items() if k != "stacks"}
        return {**numbers, "total": self.total}


def count_parameters(model: Any) -> ParameterCounts:
    """Count the parameters of a model that is prepared for its stage; tied ones count once."""
    layers = list_quantised(model).values()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    units = [*list_units(model), *(m for m in model.modules() if not any(m.children()))]
    largest = max(sum(p.numel() for p in unit.parameters()) for unit in units)
    quantised = sum(layer.in_features * layer.out_features for layer in layers)
    stacks = tuple(_measure_stacks(model))
    return ParameterCounts(total - trainable, trainable, largest, quantised, stacks)


def _measure_stacks(model: Any) -> Iterator[tuple[BlockSize, ...]]:
    blocks = {id(unit) for unit in list_units(model)}
    for stack in model.modules():
        if isinstance(stack, nn.ModuleList):
            own = tuple(_measure_block(block) for block in stack if id(block) in blocks)
            if own:
                yield own


def _measure_block(block: nn.Module) -> BlockSize:
    trainable = sum(p.numel() for p in block.parameters() if p.requires_grad)
    return BlockSize(trainable, sum(p.numel() for p in block.parameters()) - trainable)


@dataclass(frozen=True)
class StateBytes:
    """What a rank holds throughout a step."""

    frozen_weights: float
    trained_weights: float
    gathered: float
    """Copies of trained weights that are gathered for a whole step; not there between steps."""
    gradients: float
    optimizer: float
    """The optimizer's state and the fp32 weights."""
    host: float
    """In host memory, where the optimizer is offloaded."""

    @property
    def device(self) -> float:
        """On the device."""
        weights = self.frozen_weights + self.trained_weights + self.gathered
        return weights + self.gradients + self.optimizer


def compute_state(
    engine: EngineDescription,
    section: EngineSection,
    counts: ParameterCounts,
    *,
    world_size: int,
    compute_bytes: int,
    state_bytes: int,
) -> StateBytes:
    """Weights, gradients and optimizer state of a rank.

    Args:
        engine: the engine.
        section: the recipe's `engine` section.
        counts: parameters of the model.
        world_size: number of ranks.
        compute_bytes: size of a weight that the model computes with.
        state_bytes: size of the fp32 weight and the optimizer state of a parameter.
    """

    def ask(compute: int, state: int) -> Any:
        return engine.parameter_bytes(
            section, world_size=world_size, compute_bytes=compute, state_bytes=state
        )

    whole, state, gradient = ask(compute_bytes, state_bytes), ask(0, state_bytes), ask(0, 0)
    n = counts.trainable
    quantised = counts.quantised and counts.quantised * WEIGHT_BYTES[section.frozen_weights]
    return StateBytes(
        frozen_weights=counts.frozen * whole.frozen + quantised,
        trained_weights=n * (whole.trainable - state.trainable - whole.gathered),
        gathered=n * whole.gathered,
        gradients=n * gradient.trainable,
        optimizer=n * (state.trainable - gradient.trainable),
        host=n * whole.trainable_host,
    )


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on a device, and whether they fit."""

    state: StateBytes
    activations: Mapping[str, float]
    """What the largest micro-batch keeps for backward, by part of the model."""
    working: float
    """What else lives at the fullest moment: gradients of activations, temporary results."""
    inputs: float
    """The micro-batch itself, and those that are read or copied ahead."""
    buffers: float
    """What the engine's library holds."""
    context: float
    """CUDA context, NCCL, library workspaces."""
    fragmentation: float
    """What the allocator cannot use."""
    capacity: float

    @property
    def total(self) -> float:
        """All memory."""
        return (
            self.state.device
            + sum(self.activations.values())
            + self.working
            + self.inputs
            + self.buffers
            + self.context
            + self.fragmentation
        )

    @property
    def fits(self) -> bool:
        """Whether a device has room for it."""
        return self.total <= self.capacity

    def to_json(self) -> dict[str, Any]:
        """The plan's numbers, in bytes."""
        state = self.state
        return {
            "frozen_weights": state.frozen_weights,
            "trained_weights": state.trained_weights,
            "gathered_weights": state.gathered,
            "gradients": state.gradients,
            "optimizer": state.optimizer,
            "activations": dict(self.activations),
            "working": self.working,
            "inputs": self.inputs,
            "engine_buffers": self.buffers,
            "context": self.context,
            "fragmentation": self.fragmentation,
            "total": self.total,
            "capacity": self.capacity,
            "fits": self.fits,
            "host": state.host,
        }


def join_parts(kept: Mapping[str, float]) -> dict[str, float]:
    """Bytes by part of the model, under the names that people read."""
    found: dict[str, float] = {}
    for label, size in kept.items():
        name = SHOWN_PARTS[label.split(".")[0]]
        found[name] = found.get(name, 0.0) + size
    return found


def compute_memory(
    state: StateBytes, count: PackCount, gpu: GpuKind, *, inputs: float, buffers: float
) -> MemoryPlan:
    """Memory of a rank in its largest micro-batch.

    Args:
        state: what it holds throughout a step.
        count: the micro-batch, as counted.
        gpu: the device.
        inputs: bytes of the micro-batch's own tensors.
        buffers: bytes of the engine's buffers.
    """
    held = inputs * (HELD_ON_PROCESSORS if gpu.shared else HELD_ON_GPU)
    kept = {part: float(size) for part, size in count.kept.items()}
    allocated = state.device + count.peak + held + buffers
    return MemoryPlan(
        state=state,
        activations=join_parts(kept),
        working=max(0.0, count.peak - sum(kept.values())),
        inputs=held,
        buffers=buffers,
        context=gpu.context_gb * GIGA,
        fragmentation=load_assumptions().fragmentation * allocated,
        capacity=gpu.memory_gb * GIGA,
    )
