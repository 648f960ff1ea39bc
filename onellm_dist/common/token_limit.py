"""Tokens of a tokenizer that its LLM has no embedding of.

Published folders have such tokens: a padding token, or marks of pictures, that were added to the
tokenizer alone. They do no harm until one stands in a text, so whoever opens a model notes the
number of embeddings with its tokenizer, and whoever encodes a text compares its tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_LIMIT = "number_of_embeddings"
"""Attribute of a tokenizer; it is pickled with it, and not saved."""


def set_token_limit(tokenizer: Any, embeddings: int) -> None:
    """Note how many embeddings the LLM of a tokenizer has.

    Args:
        tokenizer: a transformers tokenizer.
        embeddings: rows of the LLM's embedding.
    """
    setattr(tokenizer, _LIMIT, embeddings)


def get_token_limit(tokenizer: Any) -> int | None:
    """The number of embeddings that was noted with a tokenizer; None: it is not known."""
    return getattr(tokenizer, _LIMIT, None)


def find_tokens_without_embedding(tokenizer: Any) -> dict[int, str]:
    """Id -> text of the added tokens beyond the embedding; {} where its size is not known.

    Args:
        tokenizer: a transformers tokenizer.
    """
    limit = get_token_limit(tokenizer)
    if limit is None:
        return {}
    added = tokenizer.added_tokens_decoder
    return {i: str(token) for i, token in sorted(added.items()) if i >= limit}


def describe_tokens_without_embedding(
    ids: Collection[int], beyond: Mapping[int, str]
) -> str | None:
    """Name the tokens of a text that have no embedding; None if there are none.

    Args:
        ids: the text's tokens.
        beyond: what `find_tokens_without_embedding` found.
    """
    found = [f"{beyond[i]!r} ({i})" for i in sorted(beyond.keys() & set(ids))] if beyond else []
    return ", ".join(found) or None
