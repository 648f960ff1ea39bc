"""FSDP2, described for the rest of the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.train.engine.description import (
    BlockSize,
    EngineDescription,
    HostCosts,
    ParameterBytes,
    StepTraffic,
    WeightUses,
)
from onellm_dist.train.engine.fsdp.joining import find_largest

if TYPE_CHECKING:
    from onellm_dist.config.schema import EngineSection
    from onellm_dist.train.engine.fsdp.engine import FsdpEngine
    from onellm_dist.train.engine.fsdp.inference import FsdpModel

GRADIENT_BYTES = 4
"""Gradients are reduced and kept in fp32."""
HOST_COSTS = HostCosts(33, 28)
"""What FSDP's hooks cost where all weights are sharded. A micro-batch of onellm-7b calls 1,381
modules and took 94 + 80 ms, 63 + 60 ms with frozen weights resident, 48 + 42 ms alone (one CPU
rank, the least of 30 rounds, torch 2.15, 2026-11-30)."""


@dataclass(frozen=True)
class FsdpOptions:
    """What the recipe says to FSDP2."""

    shard_ranks: int | None = None
    """Ranks that a parameter is sharded over; every group of this many ranks holds a full copy.
    None: all ranks."""
    reduce_every_micro_batch: bool = True
    """Whether gradients are reduced after every micro-batch (a rank keeps its shard of them) or
    once per step (a rank keeps all of them, with less traffic)."""
    prefetch: int = 0
    """Units that are gathered ahead of the one at work; 0: as FSDP2 does by itself."""
    unit_parameters: int = 0
    """Sharded parameters up to which consecutive blocks are one unit; 0: a block is a unit."""


class FsdpDescription(EngineDescription):
    """`engine.name: fsdp`; it reads the keys of `engine` that DeepSpeed does not."""

    name = "fsdp"
    packages = ("torch",)

    def load(self) -> type[FsdpEngine]:
        from onellm_dist.train.engine.fsdp.engine import FsdpEngine

        return FsdpEngine

    def load_sharded_model(self) -> type[FsdpModel]:
        from onellm_dist.train.engine.fsdp.inference import FsdpModel

        return FsdpModel

    def check(self, section: EngineSection, *, bf16: bool) -> None:
        """Accept every section: `engine.config` is not read."""

    def read_options(self, section: EngineSection, *, world_size: int) -> FsdpOptions:
        ranks = section.shard_ranks
        if ranks is not None and world_size % ranks:
            raise UsageError(
                f"engine.shard_ranks={ranks} does not divide the "
                f"{format_count(world_size, 'rank')} of the run",
                "every group of ranks holds a full copy of the model.",
                "set it to the number of ranks on a node, or remove it to shard over all ranks.",
            )
        each = section.reduce_every == "micro_batch"
        return FsdpOptions(ranks, each, section.prefetch, section.unit_parameters)

    def parameter_bytes(
        self,
        section: EngineSection,
        *,
        world_size: int,
        compute_bytes: int,
        state_bytes: int,
    ) -> ParameterBytes:
        ranks = section.shard_ranks or world_size
        gradient_ranks = ranks if section.reduce_every == "micro_batch" else 1
        # The fp32 weight is the weight itself: it is cast only while it is gathered.
        trainable = state_bytes / ranks + GRADIENT_BYTES / gradient_ranks
        gathered = compute_bytes if _stay_gathered(section) else 0
        frozen = compute_bytes / (1 if section.frozen == "resident" else ranks)
        return ParameterBytes(frozen, trainable + gathered, gathered=gathered)

    def describe(self, section: EngineSection) -> str:
        parts = ["FSDP2"]
        if section.shard_ranks is not None:
            parts.append(f"groups of {section.shard_ranks} ranks")
        if section.reduce_every == "step":
            parts.append("gradients reduced once a step")
        if section.frozen == "resident":
            parts.append("frozen weights resident")
        if section.prefetch:
            parts.append(f"{section.prefetch} units gathered ahead")
        if section.unit_parameters:
            parts.append(f"units of {section.unit_parameters:,} parameters")
        return ", ".join(parts)

    def row_multiple(self, section: EngineSection, *, world_size: int) -> int:
        """Every rank holds as many rows: with a thousand ranks, small parameters grow."""
        return section.shard_ranks or world_size

    def traffic(
        self,
        section: EngineSection,
        *,
        world_size: int,
        compute_bytes: int,
        trainable: int,
        uses: WeightUses,
    ) -> StepTraffic:
        ranks = section.shard_ranks or world_size
        gradients = GRADIENT_BYTES * trainable
        each, once = section.reduce_every == "micro_batch", _stay_gathered(section)
        # A block that is recomputed in backward is gathered there already. What belongs to no block
        # is gathered with the root: as a whole, in forward and backward.
        read = uses.trained_forward + uses.trained_backward
        read += 2 * uses.loose_trained - uses.loose_trained_reads
        if section.frozen != "resident":
            read += uses.frozen_forward + uses.frozen_backward
            loose, reads = (
                uses.loose - uses.loose_trained,
                uses.loose_reads - uses.loose_trained_reads,
            )
            read += 2 * loose - reads
        # Groups of ranks meet once a step, with their shards of the gradients. With one reduction a
        # step, a unit that runs twice in a micro-batch is reduced twice in the last backward (its
        # first pass through there sends what earlier micro-batches left), which is not counted.
        return StepTraffic(
            gather_micro_batch=0 if once else compute_bytes * read,
            reduce_micro_batch=gradients if each else 0,
            gather_step=0,
            reduce_step=gradients / ranks if ranks < world_size else 0,
            gather_ranks=ranks,
            reduce_ranks=ranks,
            step_ranks=world_size,
            gather_first=compute_bytes * trainable if once else 0,
            reduce_last=0 if each else gradients,
        )

    def buffer_bytes(
        self,
        section: EngineSection,
        *,
        compute_bytes: int,
        parameters: int,
        largest_unit: int,
        stacks: Sequence[Sequence[BlockSize]],
    ) -> float:
        # The unit at work and the next ones, gathered, and the fp32 input of a reduction.
        gathered = 1 if _stay_gathered(section) else 1 + max(1, section.prefetch)
        unit = max(
            largest_unit, find_largest(_list_sharded(section, stacks), section.unit_parameters)
        )
        return float(unit * (gathered * compute_bytes + GRADIENT_BYTES))

    def host_costs(self, section: EngineSection, *, frozen_blocks: float) -> HostCosts:
        if section.frozen != "resident":
            return HOST_COSTS
        # Blocks that are resident as a whole belong to no unit, and have no hooks.
        trained = 1 - frozen_blocks
        return HostCosts(HOST_COSTS.forward_us * trained, HOST_COSTS.backward_us * trained)

    def list_choices(self, *, world_size: int, gpus_per_node: int) -> list[dict[str, Any]]:
        choices: list[dict[str, Any]] = [
            {"name": self.name},
            {"name": self.name, "reduce_every": "step"},
            {"name": self.name, "frozen": "resident"},
            {"name": self.name, "frozen": "resident", "reduce_every": "step"},
        ]
        return choices

    def find_untimed(self, section: EngineSection) -> str | None:
        if section.shard_ranks is None:
            return None
        return "reductions between the groups of engine.shard_ranks, which share the network"


def _stay_gathered(section: EngineSection) -> bool:
    """Whether trained weights are gathered once a step, and stay so until its last backward."""
    return section.frozen == "resident" and section.reduce_every == "step"


def _list_sharded(section: EngineSection, stacks: Sequence[Sequence[BlockSize]]) -> list[list[int]]:
    """Sharded parameters of the blocks of each stack that have any."""

    def count(block: BlockSize) -> int:
        return block.trainable + (0 if section.frozen == "resident" else block.frozen)

    return [[size for size in map(count, stack) if size] for stack in stacks]


DESCRIPTION = FsdpDescription()
