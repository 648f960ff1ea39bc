"""One rule for control tokens that stand in a text.

A control token (`</s>`, `<|im_start|>`) is a special token of a tokenizer. Where one is written in
a text, the text is meant: it is encoded as ordinary tokens, never as the control token, in training
and in prompts alike. A tokenizer that cannot do this (to the models of some, a control token is a
piece of text) refuses the text. In a chat template control tokens structure the conversation, so
turns that contain one are refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def list_control_tokens(tokenizer: Any) -> dict[int, str]:
    """Id -> control token of a tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
    """
    added = tokenizer.added_tokens_decoder.items()
    return {int(number): str(token) for number, token in added if token.special}


def list_forbidden_ids(tokenizer: Any) -> dict[int, str]:
    """The control tokens that no text may be encoded as: all but that of unknown words.

    Args:
        tokenizer: a transformers tokenizer.
    """
    unknown = tokenizer.unk_token_id
    structural = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    kept = None if unknown in structural else unknown
    return {i: token for i, token in list_control_tokens(tokenizer).items() if i != kept}


def describe_control_token(ids: Iterable[int], forbidden: Mapping[int, str]) -> str | None:
    """What is wrong with the ids of a text that became a control token; None: nothing.

    Args:
        ids: what a text was encoded as.
        forbidden: see `list_forbidden_ids`.
    """
    found = next((forbidden[i] for i in ids if i in forbidden), None)
    if found is None:
        return None
    return f"its text contains {found!r}, which the tokenizer can only read as the control token"


def find_control_token(text: str, tokens: Iterable[str]) -> str | None:
    """The first of some control tokens that is written in a text.

    Args:
        text: any text.
        tokens: control tokens.
    """
    return next((token for token in tokens if token in text), None)
