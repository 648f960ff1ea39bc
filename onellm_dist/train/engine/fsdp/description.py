"""FSDP2, described for the rest of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from onellm_dist.common.errors import UsageError
from onellm_dist.train.engine.description import EngineDescription, ParameterBytes

if TYPE_CHECKING:
    from onellm_dist.config.schema import EngineSection
    from onellm_dist.train.engine.fsdp.engine import FsdpEngine

GRADIENT_BYTES = 4
"""Gradients are reduced and kept in fp32."""


@dataclass(frozen=True)
class FsdpOptions:
    """What the recipe says to FSDP2."""

    shard_ranks: int | None = None
    """Ranks that a parameter is sharded over; every group of this many ranks holds a full copy.
    None: all ranks."""
    reduce_every_micro_batch: bool = True
    """Whether gradients are reduced after every micro-batch (a rank keeps its shard of them) or
    once per step (a rank keeps all of them, with less traffic)."""


class FsdpDescription(EngineDescription):
    """`engine.name: fsdp`; it reads `engine.shard_ranks` and `engine.reduce_every`."""

    name = "fsdp"
    packages = ("torch",)

    def load(self) -> type[FsdpEngine]:
        from onellm_dist.train.engine.fsdp.engine import FsdpEngine

        return FsdpEngine

    def check(self, section: EngineSection, *, bf16: bool) -> None:
        """Accept every section: `engine.config` is not read."""

    def read_options(self, section: EngineSection, *, world_size: int) -> FsdpOptions:
        ranks = section.shard_ranks
        if ranks is not None and world_size % ranks:
            raise UsageError(
                f"engine.shard_ranks={ranks} does not divide the {world_size} ranks of the run",
                "every group of ranks holds a full copy of the model.",
                "set it to the number of ranks on a node, or remove it to shard over all ranks.",
            )
        return FsdpOptions(ranks, section.reduce_every == "micro_batch")

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
        return ParameterBytes(compute_bytes / ranks, trainable)


DESCRIPTION = FsdpDescription()
