"""Where an engine may keep weights that do not train (`engine.frozen`)."""

from __future__ import annotations

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import EngineSection
from onellm_dist.train.engine.select import get_engine


def list_placements(section: EngineSection, *, bf16: bool) -> list[EngineSection]:
    """What a section may become: `sharded`, then `resident`.

    Args:
        section: the recipe's `engine` section.
        bf16: whether the model computes in bf16.

    Returns:
        The section alone, if it says where frozen weights lie or its engine leaves no choice.
    """
    if section.frozen != "auto" or section.frozen_weights != "plain":  # quantised: on every rank
        return [section]
    engine = get_engine(section.name)
    found = [section.model_copy(update={"frozen": name}) for name in ("sharded", "resident")]
    try:
        for choice in found:
            engine.check(choice, bf16=bf16)
    except UsageError:
        return [section]
    return found


def can_shard_instead(section: EngineSection, *, bf16: bool) -> bool:
    """Whether the frozen weights that a section keeps on every rank could be sharded.

    Args:
        section: the recipe's `engine` section.
        bf16: whether the model computes in bf16.
    """
    if section.frozen != "resident":
        return False
    undecided = section.model_copy(update={"frozen": "auto"})
    return len(list_placements(undecided, bf16=bf16)) > 1
