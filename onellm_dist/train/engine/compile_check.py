"""Whether `train.compile` can compile a model as an engine shards it."""

from __future__ import annotations

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import EngineSection
from onellm_dist.config.train_sections import TrainSection
from onellm_dist.train.engine.select import get_engine


def check_compile(engine: EngineSection, train: TrainSection) -> None:
    """Refuse what cannot be compiled, without importing torch.

    Args:
        engine: a section that the engine's own `check` accepts.
        train: the `train` section.

    Raises:
        UsageError: `train.compile=blocks` with quantised weights, or with an engine that has hooks
            within a block.
    """
    if train.compile == "none":
        return
    if engine.frozen_weights != "plain":
        raise UsageError(
            f"train.compile=blocks with engine.frozen_weights={engine.frozen_weights}",
            "compiled layers of rounded weights have not been shown to give the same numbers.",
            "use engine.frozen_weights=plain, or train.compile=none.",
        )
    description = get_engine(engine.name)
    if description.hooks_within_blocks(engine):
        raise UsageError(
            f"train.compile=blocks under {description.describe(engine)}",
            "it gathers weights within a block, in hooks that cannot be compiled.",
            "use engine.name=fsdp or ZeRO-1 or 2 (engine.config), or train.compile=none.",
        )
