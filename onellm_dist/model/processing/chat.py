"""Conversations as the token ids that training reads in the LLM's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from onellm_dist.common.chat_template import ChatTemplate
from onellm_dist.common.start_token import get_start_id
from onellm_dist.common.turns import ConversationTurn


def render_conversations(
    tokenizer: Any, conversations: Sequence[Sequence[ConversationTurn]], **options: Any
) -> list[str]:
    """Texts of conversations.

    Args:
        tokenizer: a transformers tokenizer.
        conversations: the turns of each.
        options: of the tokenizer's `apply_chat_template`.
    """
    return [
        tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.text} for turn in turns], tokenize=False, **options
        )
        for turns in conversations
    ]


def encode_conversation(
    tokenizer: Any,
    turns: Sequence[ConversationTurn],
    *,
    prompt: bool,
    backend: Tokenizer | None = None,
) -> tuple[list[int], list[int]]:
    """Ids of a conversation, and which of them training supervises.

    Args:
        tokenizer: a fast transformers tokenizer.
        turns: the conversation.
        prompt: whether the text ends where an answer would begin; nothing is supervised then.
        backend: what encodes the text; default: the tokenizer itself.

    Returns:
        (ids with BOS first, 1 for each supervised token and 0 for the others).

    Raises:
        UsageError: the tokenizer has no chat template that can be used.
        SampleError: the template refuses the turns, or one contains a control token.
    """
    template = ChatTemplate(tokenizer)
    text, answers = (template.render_prompt(turns), []) if prompt else template.render(turns)
    encoded: Any
    if backend is not None:
        own = backend.encode(text, add_special_tokens=False)
        encoded = {"input_ids": own.ids, "offset_mapping": own.offsets}
    else:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(encoded["input_ids"])
    mask = [
        int(any(start < token_end and token_start < end for start, end in answers))
        for token_start, token_end in encoded["offset_mapping"]
    ]
    if template.has_bos:
        return ids, mask
    return [get_start_id(tokenizer) or 0, *ids], [0, *mask]
