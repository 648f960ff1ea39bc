"""How many positions an LLM has: those of its tables, or those that it was trained for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from onellm_dist.common.errors import UsageError

if TYPE_CHECKING:
    from onellm_dist.model.llm.call import LLMSupport

POSITION_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_target_positions",
    "max_seq_len",
    "max_sequence_length",
)
"""Names under which configs have the number of positions."""
MOST_SPARE_ROWS = 4
"""The most by which the rows of a table of positions differ from the number in the config."""
_SCALED = ("linear", "dynamic", "yarn")
"""Kinds of RoPE scaling whose factor multiplies a number of positions that configs have unscaled
(`longrope` and `llama3` configs have the scaled number)."""


def get_positions(config: Any) -> int | None:
    """Number of positions that the config of an LLM, or its text part, names; None: it names none.

    Args:
        config: config of a causal LM.
    """
    own = next((v for n in POSITION_KEYS if isinstance(v := getattr(config, n, None), int)), None)
    text = getattr(config, "text_config", None)
    return get_positions(text) if own is None and text is not None else own


def find_spare_positions(positions: int, takes: Callable[[int], bool]) -> int | None:
    """How many more positions an LLM has than its config names; None: it has no such limit.

    A table of positions may have rows that are not for tokens: the limit may be below the number in
    the config.

    Args:
        positions: the number in the config.
        takes: whether the LLM can be run on a number of tokens.
    """
    if takes(positions + MOST_SPARE_ROWS + 1):
        return None
    around = range(MOST_SPARE_ROWS, -MOST_SPARE_ROWS - 1, -1)
    return next((spare for spare in around if takes(positions + spare)), -positions)


def get_context(config: Any, support: LLMSupport) -> int | None:
    """The longest sequence that an LLM is made for, media included; None: any length.

    It is the size of a table of positions. Without one, it is the length up to which RoPE was
    trained, or is scaled.

    Args:
        config: config of the LLM.
        support: how it runs exactly.
    """
    if support.position_limit is not None:
        return support.position_limit
    positions = get_positions(config)
    text = getattr(config, "text_config", None) or config
    if positions is None:
        return None
    return max(positions, *_list_scaled(text, positions))


def _list_scaled(config: Any, positions: int) -> list[int]:
    """The positions that each RoPE scaling of a config reaches; 0 where it has none."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    found = [0]
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        factor = part.get("factor")
        if part.get("rope_type", part.get("type")) in _SCALED and isinstance(factor, int | float):
            original = part.get("original_max_position_embeddings")
            found.append(int(factor * (original or positions)))
    return found


def check_new_tokens(name: str, context: int | None, prompt: int, new: int) -> None:
    """Check that prompt and new tokens are not longer than an LLM is made for.

    Args:
        name: the LLM's class.
        context: see `get_context`.
        prompt: positions of the longest prompt, media included.
        new: the most new tokens.

    Raises:
        UsageError: they are longer.
    """
    if context is not None and prompt + new > context:
        raise UsageError(
            f"prompt, media and new tokens take {prompt + new} positions ({prompt} + {new})",
            f"{name} has {context}.",
            f"ask for at most {context - prompt} new tokens (max_new_tokens)."
            if context > prompt
            else "shorten the prompt, or give fewer media.",
        )
