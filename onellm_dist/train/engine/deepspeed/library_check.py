"""What DeepSpeed itself makes of a configuration: its own errors, in words (0.19.8)."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from pydantic import ValidationError

from onellm_dist.common.errors import UsageError
from onellm_dist.train.engine.deepspeed.config import format_problems


def check_with_deepspeed(config: dict[str, Any]) -> None:
    """Let DeepSpeed read a completed configuration, before anything is built of it.

    Raises:
        UsageError: DeepSpeed refuses it, by whatever exception.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    try:
        DeepSpeedConfig(deepcopy(config))
    except ValidationError as error:
        _refuse(f"{error.title}: {format_problems(error)}")
    except Exception as error:
        _refuse(f"{type(error).__name__}: {error}")


def _refuse(problem: str) -> None:
    raise UsageError(
        f"engine.config: DeepSpeed refuses the configuration: {problem}",
        "the engine cannot be built.",
        "correct the DeepSpeed JSON; ds_configs/ has examples.",
    ) from None
