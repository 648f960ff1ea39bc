"""Numbers in environment variables."""

from __future__ import annotations

from collections.abc import Mapping

from onellm_dist.common.errors import UsageError


def read_number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Read an integer.

    Args:
        env: environment variables.
        name: the variable.
        default: the value where it is missing or empty; None: it must be there.

    Raises:
        UsageError: it is missing or not a number; the error names it.
    """
    text = env.get(name, "")
    if not text and default is not None:
        return default
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"{name}={text} in the environment is not a number",
            "the ranks cannot meet.",
            f"correct or unset {name}, or start through deepspeed, torchrun or srun.",
        ) from None
