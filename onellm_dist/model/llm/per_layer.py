"""Per-layer embeddings (Gemma 3n, Gemma 4): every layer adds a row of its own for each token.

The LLM is given embeddings, not ids, and would leave these rows out (Gemma 3n) or guess the ids
from the embeddings, which fails for media (Gemma 4). So the ids of the text go with the embeddings.
A position of a medium has the row that the LLM's own multimodal code gives it: that of id 0 in
Gemma 3n, that of the padding token in Gemma 4 (transformers 5.23).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_OWNERS = "_onellm_per_layer"
"""Attribute of an LLM: a list of its module with per-layer embeddings, if it has one."""
MEDIA = -1
"""Stands for the id of a position inside a media span."""


def get_token_ids(text: torch.Tensor, gather: torch.Tensor) -> torch.Tensor:
    """Id of the token at each position of a pack; MEDIA inside a span: [T].

    Args:
        text: [T_text] ids of all texts, end to end.
        gather: [T], place in `text` of each position; inside a span, a larger number.
    """
    ids = text.index_select(0, gather.clamp(max=len(text) - 1))
    return torch.where(gather < len(text), ids, MEDIA)


@contextmanager
def give_token_ids(llm: Any, ids: torch.Tensor) -> Iterator[None]:
    """Let the forwards of an LLM from embeddings know the tokens, where it needs them.

    Args:
        llm: the causal LM.
        ids: [B, S] ids of the positions of the embeddings; MEDIA inside a span.
    """
    owners = _find_owners(llm)
    if not owners:
        yield
        return
    (owner,) = owners
    takes_embeds = "inputs_embeds" in inspect.signature(owner.get_per_layer_inputs).parameters

    def add(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeds = kwargs.get("inputs_embeds")
        if embeds is None:  # a generated token, given by its id
            return args, kwargs
        # beams and several sequences repeat the rows
        rows = ids.repeat_interleave(len(embeds) // len(ids), 0)
        rows = torch.where(rows == MEDIA, _get_media_id(owner), rows)
        # in transformers before 5.23 Gemma 4 wants the embeddings too, and uses the ids
        given = (rows, embeds) if takes_embeds else (rows,)
        return args, {**kwargs, "per_layer_inputs": owner.get_per_layer_inputs(*given)}

    handle = llm.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _find_owners(llm: Any) -> list[Any]:
    found: list[Any] | None = getattr(llm, _OWNERS, None)
    if found is None:
        found = [
            module
            for module in llm.modules()
            if hasattr(type(module), "get_per_layer_inputs")
            and getattr(module, "hidden_size_per_layer_input", None)
        ]
        setattr(llm, _OWNERS, found)  # a list: a module would be registered twice
    return found


def _get_media_id(owner: Any) -> int:
    if owner.config.model_type.startswith("gemma3n"):
        return 0
    return owner.config.pad_token_id or 0
