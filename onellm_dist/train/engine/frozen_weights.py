"""Whether a recipe's frozen weights can be quantised (`engine.frozen_weights`)."""

from __future__ import annotations

import importlib.util

from onellm_dist.common.errors import UsageError
from onellm_dist.common.extras import get_install_command
from onellm_dist.config.schema import EngineSection
from onellm_dist.config.train_sections import TrainSection


def has_torchao() -> bool:
    """Whether torchao is installed; it is not imported, which takes seconds."""
    return importlib.util.find_spec("torchao") is not None


def _trains_whole_llm(train: TrainSection) -> bool:
    """Whether a recipe surely leaves nothing of the LLM frozen; a rule that freezes may."""
    return (
        train.stage in ("tune", "joint")
        and train.lora is None
        and not any(rule.freeze for rule in train.parameters)
    )


def check_frozen_weights(engine: EngineSection, train: TrainSection) -> None:
    """Refuse what quantised weights cannot do, without importing torch.

    Raises:
        UsageError: torchao is not installed, nothing of the LLM is frozen, or adapters read the
            weights that they stand beside.
    """
    if engine.frozen_weights == "plain":
        return
    key = f"engine.frozen_weights={engine.frozen_weights}"
    if train.lora is not None and train.lora.dora:
        raise UsageError(
            f"{key} with train.lora.dora=true",
            "DoRA reads the norms of the frozen weights in every step, and PEFT has no such "
            "reading of quantised ones.",
            "set train.lora.dora=false, or engine.frozen_weights=plain.",
        )
    if _trains_whole_llm(train):
        raise UsageError(
            f"{key} with train.stage={train.stage} and without train.lora",
            "the LLM trains: none of its linear layers is frozen.",
            "add adapters (train.lora), or set engine.frozen_weights=plain.",
        )
    if engine.frozen_weights != "fp8" and not has_torchao():
        raise UsageError(
            f"{key}: the package torchao is not installed",
            "it rounds and holds the weights.",
            f"set engine.frozen_weights=plain, or {get_install_command('quantise')}.",
        )
