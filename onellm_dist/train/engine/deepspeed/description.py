"""DeepSpeed's ZeRO, described for the rest of the package (facts seen with DeepSpeed 0.19.8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from onellm_dist.common.errors import UsageError
from onellm_dist.train.engine.deepspeed.config import (
    complete_config,
    get_zero_stage,
    is_optimizer_offloaded,
    load_ds_config,
)
from onellm_dist.train.engine.description import EngineDescription, ParameterBytes

if TYPE_CHECKING:
    from onellm_dist.config.schema import EngineSection
    from onellm_dist.train.engine.deepspeed.engine import DeepSpeedEngine

GRADIENT_BYTES = 4
"""Gradients accumulate in fp32."""


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
                "remove them; DeepSpeed's own key for hybrid sharding is zero_hpz_partition_size.",
            )
        complete_config(load_ds_config(section.config), bf16=bf16, grad_clip=0.0)

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


DESCRIPTION = DeepSpeedDescription()
