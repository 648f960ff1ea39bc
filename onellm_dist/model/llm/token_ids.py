"""Token ids against the LLM's embedding: nothing is looked up that is not there."""

from __future__ import annotations

from typing import Any

import torch

from onellm_dist.common.errors import UsageError


def count_embeddings(embedding: Any) -> int:
    """Rows of a token embedding, also of one whose weight is sharded away.

    Args:
        embedding: what `get_input_embeddings` gives.
    """
    return int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])


def check_tokens(input_ids: torch.Tensor, embeddings: int) -> None:
    """Refuse ids that have no embedding.

    Args:
        input_ids: ids of any shape.
        embeddings: rows of the LLM's embedding.

    Raises:
        UsageError: an id is negative or too large.
    """
    if not input_ids.numel():
        return
    low, high = input_ids.aminmax()
    for found in (int(low), int(high)):
        if not 0 <= found < embeddings:
            raise UsageError(
                f"a text has token {found}, the LLM has {embeddings} embeddings",
                "there is nothing to look up.",
                "encode texts with the tokenizer of the model's folder, without tokens that were "
                "added to it alone; or enlarge the LLM's embedding (resize_token_embeddings).",
            )


def replace_padding(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, embeddings: int
) -> torch.Tensor:
    """Ids that can be looked up: padding may have an id that the LLM does not know.

    Args:
        input_ids: [B, S].
        attention_mask: [B, S], 0 for padding.
        embeddings: rows of the LLM's embedding.

    Returns:
        [B, S] ids; what stands at padding is read by nothing.

    Raises:
        UsageError: a token of a text is negative or too large.
    """
    if attention_mask is not None:
        input_ids = input_ids.masked_fill(
            (attention_mask == 0) & ((input_ids < 0) | (input_ids >= embeddings)), 0
        )
    check_tokens(input_ids, embeddings)
    return input_ids


def choose_padding(pad: int | None, ends: int | list[int] | None, embeddings: int) -> int | None:
    """The id that fills up answers that have ended: one that can be looked up.

    Args:
        pad: `pad_token_id`.
        ends: `eos_token_id`.
        embeddings: rows of the LLM's embedding.
    """
    if pad is None or pad < embeddings:
        return pad
    listed = [ends] if isinstance(ends, int) else ends or []
    return next((end for end in listed if end < embeddings), 0)
