"""The engine of a recipe's `engine.name`; its library is imported only then."""

from __future__ import annotations

from onellm_dist.common.errors import UsageError
from onellm_dist.train.engine.base import Engine, EngineSettings


def engine_class(name: str) -> type[Engine]:
    """`deepspeed` or `fsdp`."""
    if name == "fsdp":
        from onellm_dist.train.engine.fsdp.engine import FsdpEngine

        return FsdpEngine
    from onellm_dist.train.engine.deepspeed.engine import DeepSpeedEngine

    return DeepSpeedEngine


def checked(settings: EngineSettings) -> EngineSettings:
    """The settings, if the ranks fit them.

    Raises:
        UsageError: hybrid sharding over groups that the ranks do not fill.
    """
    if settings.shard_ranks is not None and settings.world % settings.shard_ranks:
        raise UsageError(
            f"engine.shard_ranks={settings.shard_ranks} does not divide the {settings.world} ranks of the run",
            "every group of ranks holds a whole copy of the model.",
            "set it to the ranks of a node, or leave it out to shard over all ranks.",
        )
    return settings
