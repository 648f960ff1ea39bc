"""Changes that transformers offers, and after which an opened model would not be exact."""

from __future__ import annotations

from typing import Any

from onellm_dist.common.errors import UsageError


def refuse_attention(wanted: str | dict[Any, Any], own: str) -> None:
    """Refuse another attention of the LLM than the one that it has been shown exact with.

    Args:
        wanted: the name of an attention.
        own: the LLM's.

    Raises:
        UsageError: they differ.
    """
    if wanted != own:
        raise UsageError(
            f"set_attn_implementation({wanted!r})",
            f"the LLM is exact with {own!r}; with another attention, samples of a pack could see "
            "each other.",
            "leave it as it is; packs already take the fastest kernel of the machine.",
        )


def refuse_overlap(places: Any) -> None:
    """Refuse maps that place a part twice: once with the whole that it belongs to, once alone.

    Args:
        places: part to device, as transformers' `device_map`; anything else is not such a map.

    Raises:
        UsageError: a part is placed twice.
    """
    names = list(places) if isinstance(places, dict) else []
    for name in names:
        for other in names:
            if other != name and (not other or name.startswith(f"{other}.")):
                raise UsageError(
                    f"device_map places {name} in {other or '(the model)'} and apart",
                    "transformers would leave some weights without values.",
                    "name parts that do not contain each other, or use device_map='auto'.",
                )


def refuse_resize(tokens: int | None) -> None:
    """Refuse another number of embeddings; None: the number stays.

    Raises:
        UsageError: a number is given.
    """
    if tokens is not None:
        raise UsageError(
            f"resize_token_embeddings({tokens})",
            "the LLM was opened with its embedding, and checkpoints are compared with it.",
            "resize the LLM alone, save it, and assemble a model of it (onellm convert assemble).",
        )
