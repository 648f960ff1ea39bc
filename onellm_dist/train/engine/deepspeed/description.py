"""DeepSpeed's ZeRO, described for the rest of the package (facts seen with DeepSpeed 0.19.8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onellm_dist.common.errors import UsageError
from onellm_dist.train.engine.deepspeed.config import (
    complete_config,
    get_zero_stage,
    is_optimizer_offloaded,
    load_ds_config,
)
from onellm_dist.train.engine.description import (
    BlockSize,
    EngineDescription,
    HostCosts,
    ParameterBytes,
    StepTraffic,
    WeightUses,
)

if TYPE_CHECKING:
    from onellm_dist.config.schema import EngineSection
    from onellm_dist.train.engine.deepspeed.engine import DeepSpeedEngine

GRADIENT_BYTES = 4
"""Gradients accumulate in fp32, and are reduced in fp32."""
REDUCE_BUCKET = 500_000_000
"""DeepSpeed's default of `reduce_bucket_size` and `allgather_bucket_size`, in elements."""
PREFETCH_BUCKET = 50_000_000
"""DeepSpeed's default of `stage3_prefetch_bucket_size`, in elements."""
MAX_LIVE = 1_000_000_000
"""DeepSpeed's default of `stage3_max_live_parameters`."""
HOST_COSTS = {0: HostCosts(0, 0), 1: HostCosts(0, 9), 2: HostCosts(0, 9)}
"""ZeRO stage to what its hooks cost. A micro-batch of onellm-7b calls 1,381 modules and took
48 + 42 ms alone, 49 + 54 ms under ZeRO-2, 156 + 127 ms under ZeRO-3 with quicker hooks (one CPU
rank, the least of 30 rounds, torch 2.15, DeepSpeed 0.19.8, 2026-11-30)."""
HOST_COSTS_ZERO3 = HostCosts(78, 61)
HOST_COSTS_LEAVES = HostCosts(30, 38)
"""With all transformer blocks as leaf modules. Frozen ones alone, 70% of the modules, gave
110 + 104 ms (as above)."""


class DeepSpeedDescription(EngineDescription):
    """`engine.name: deepspeed`; `engine.config` names a DeepSpeed JSON."""

    name = "deepspeed"
    packages = ("deepspeed",)
    environment_prefixes = ("DS_",)
    waiting_files = ("deepspeed/comm/", "deepspeed/runtime/comm/", "deepspeed/runtime/zero/")
    # Waits for parameter gathers go through a wrapper there.
    wrapper_files = ("deepspeed/utils/nvtx.py",)
    # The all-reduce buffers of CPU ranks, 66 MiB each.
    shared_memory_pattern = "deepspeed_allreduce_buffer_*"

    def load(self) -> type[DeepSpeedEngine]:
        from onellm_dist.train.engine.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine

    def check(self, section: EngineSection, *, bf16: bool) -> None:
        if section.shard_ranks is not None or section.reduce_every != "micro_batch":
            raise UsageError(
                "engine.shard_ranks and engine.reduce_every need engine.name=fsdp",
                "DeepSpeed does not read them.",
                "remove them, or over a base that sets them write engine.shard_ranks=null "
                "engine.reduce_every=micro_batch; DeepSpeed's own key for hybrid sharding is "
                "zero_hpz_partition_size.",
            )
        if section.prefetch or section.unit_parameters:
            raise UsageError(
                "engine.prefetch and engine.unit_parameters need engine.name=fsdp",
                "DeepSpeed does not read them.",
                "remove them, or over a base that sets them write 0; DeepSpeed's own keys are "
                "stage3_prefetch_bucket_size and leaf_module (engine.config=zero3_leaves).",
            )
        config = load_ds_config(section.config)
        check_frozen(section, config)
        complete_config(config, bf16=bf16, grad_clip=0.0)

    def read_options(self, section: EngineSection, *, world_size: int) -> dict[str, Any]:
        """Read the DeepSpeed JSON."""
        return load_ds_config(section.config)

    def parameter_bytes(
        self,
        section: EngineSection,
        *,
        world_size: int,
        compute_bytes: int,
        state_bytes: int,
    ) -> ParameterBytes:
        config = load_ds_config(section.config)
        stage = get_zero_stage(config)
        weight = compute_bytes / (world_size if stage == 3 else 1)
        gradient = GRADIENT_BYTES / (world_size if stage >= 2 else 1)
        state = state_bytes / (world_size if stage >= 1 else 1)
        if is_optimizer_offloaded(config):
            return ParameterBytes(weight, weight, gradient + state)
        return ParameterBytes(weight, weight + gradient + state)

    def describe(self, section: EngineSection) -> str:
        config = load_ds_config(section.config)
        name = f"DeepSpeed ZeRO-{get_zero_stage(config)}"
        return f"{name}, optimizer offloaded" if is_optimizer_offloaded(config) else name

    def traffic(
        self,
        section: EngineSection,
        *,
        world_size: int,
        compute_bytes: int,
        trainable: int,
        uses: WeightUses,
    ) -> StepTraffic:
        config = load_ds_config(section.config)
        stage = get_zero_stage(config)
        zero = config.get("zero_optimization", {})
        gradients = GRADIENT_BYTES * trainable
        if stage < 3:
            # ZeRO-1 reduces what has accumulated once a step, ZeRO-2 after each micro-batch.
            # Stage 0 reduces and keeps complete weights.
            return StepTraffic(
                gather_micro_batch=0,
                reduce_micro_batch=gradients if stage == 2 else 0,
                # an all-reduce is a reduction and a gather
                gather_step=compute_bytes * trainable if stage else gradients,
                reduce_step=gradients if stage < 2 else 0,
                gather_ranks=world_size,
                reduce_ranks=world_size,
                step_ranks=world_size,
            )
        # Each module's weights are gathered in forward, again where it is recomputed, and again in
        # backward. Weights that are read again within `stage3_max_reuse_distance` are not, which
        # saves up to a twentieth at 7B; a model smaller than that is gathered once.
        read = (
            uses.frozen_forward
            + uses.frozen_recomputed
            + uses.frozen_backward
            + uses.trained_forward
            + uses.trained_recomputed
            + uses.trained_backward
        )
        return StepTraffic(
            gather_micro_batch=compute_bytes * read,
            reduce_micro_batch=gradients,
            gather_step=0,
            reduce_step=0,
            gather_ranks=min(world_size, get_hpz(zero) or world_size),
            reduce_ranks=world_size,
            step_ranks=world_size,
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
        config = load_ds_config(section.config)
        zero = config.get("zero_optimization", {})
        stage = get_zero_stage(config)
        buckets = 2 if zero.get("overlap_comm") else 1
        reduce = GRADIENT_BYTES * buckets * int(zero.get("reduce_bucket_size", REDUCE_BUCKET))
        if stage == 0:
            return float(reduce)
        if stage < 3:
            return float(
                reduce + compute_bytes * int(zero.get("allgather_bucket_size", REDUCE_BUCKET))
            )
        # Gathered weights that are soon read again stay, up to the limit.
        live = min(parameters, int(zero.get("stage3_max_live_parameters", MAX_LIVE)))
        prefetch = int(zero.get("stage3_prefetch_bucket_size", PREFETCH_BUCKET))
        gathered = compute_bytes * max(largest_unit + prefetch, live)
        return float(reduce + gathered)

    def host_costs(self, section: EngineSection, *, frozen_blocks: float) -> HostCosts:
        config = load_ds_config(section.config)
        whole = HOST_COSTS.get(get_zero_stage(config), HOST_COSTS_ZERO3)
        leaves = config.get("zero_optimization", {}).get("leaf_module") or {}
        if get_zero_stage(config) < 3 or not leaves.get("classes"):
            return whole
        # Blocks that train are not leaves (`leaves.name_leaves`).
        return HostCosts(
            whole.forward_us + frozen_blocks * (HOST_COSTS_LEAVES.forward_us - whole.forward_us),
            whole.backward_us + frozen_blocks * (HOST_COSTS_LEAVES.backward_us - whole.backward_us),
        )

    def hooks_within_blocks(self, section: EngineSection) -> bool:
        return get_zero_stage(load_ds_config(section.config)) == 3

    def find_untimed(self, section: EngineSection) -> str | None:
        config = load_ds_config(section.config)
        zero = config.get("zero_optimization", {})
        if is_optimizer_offloaded(config) or _is_offloaded(zero.get("offload_param")):
            return "offload: copies to and from the host, the optimizer on its cores, its memory"
        if get_hpz(zero) is not None:
            return "zero_hpz_partition_size: its first gathers, and the memory of its copies"
        return None

    def list_choices(self, *, world_size: int, gpus_per_node: int) -> list[dict[str, Any]]:
        names = ("zero1", "zero2", "zero3", "zero3_leaves")
        return [{"name": self.name, "config": name} for name in names]


def check_frozen(section: EngineSection, config: dict[str, Any]) -> None:
    """Refuse an `engine.frozen` that a DeepSpeed JSON contradicts.

    Raises:
        UsageError: weights do not lie where it says.
    """
    stage = get_zero_stage(config)
    if section.frozen == "sharded" and stage < 3:
        raise UsageError(
            f"engine.frozen=sharded with ZeRO stage {stage}",
            "below stage 3, every rank holds all weights.",
            "set engine.config=zero3, or engine.frozen=auto.",
        )
    if section.frozen == "resident" and stage == 3:
        raise UsageError(
            "engine.frozen=resident with ZeRO stage 3",
            "it shards all weights alike.",
            "set engine.config=zero2, which keeps all weights, or engine.name=fsdp.",
        )


def get_hpz(zero: Mapping[str, Any]) -> int | None:
    """Ranks that share a second copy of the weights (hpZ); None: there is none, as by default."""
    ranks = zero.get("zero_hpz_partition_size", 1)
    return ranks if isinstance(ranks, int) and ranks > 1 else None


def _is_offloaded(section: object) -> bool:
    return isinstance(section, Mapping) and section.get("device", "none") != "none"


DESCRIPTION = DeepSpeedDescription()
