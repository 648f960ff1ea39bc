"""Conversations of captions: the option `question`, by which captions can be used for asking."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.turns import find_conversation
from onellm_dist.shards.sources.readers.conversations import (
    CAPTION_PROMPTS,
    make_turns,
)

DEFAULT_QUESTION = "default"
"""`question=default`: the paper's prompt for captions of the modality."""


def list_questions(question: str | None, modalities: Sequence[str]) -> tuple[str, ...]:
    """List the questions of the option `question`; () without one.

    Args:
        question: the option's value.
        modalities: those of the dataset.

    Raises:
        UsageError: there is no usual prompt for these modalities.
    """
    if question is None:
        return ()
    if question != DEFAULT_QUESTION:
        return tuple(one.strip() for one in question.split("|"))
    if len(modalities) != 1 or modalities[0] not in CAPTION_PROMPTS:
        raise UsageError(
            f"question={DEFAULT_QUESTION}: the paper has no prompt for captions of "
            f"{' and '.join(modalities) or 'text'}.",
            f"it has prompts for {', '.join(CAPTION_PROMPTS)}.",
            "write the question itself: -o question='What is this?'",
        )
    return (CAPTION_PROMPTS[modalities[0]],)


def add_conversation(
    key: str, meta: Mapping[str, Any], caption: bytes | None, questions: Sequence[str]
) -> dict[str, Any] | None:
    """Add a conversation to the metadata of a sample that has a caption and no conversation.

    Args:
        key: the sample's key, which chooses one of several questions.
        meta: its `.json`.
        caption: its `.txt`; None: the caption, or the first of several, is in `meta`.
        questions: from `list_questions`, at least one.

    Returns:
        The metadata with `conversations`; None: the sample stays as it is.
    """
    found = meta.get("caption", meta.get("captions")) if caption is None else caption.decode()
    first = found[0] if isinstance(found, list) and found else found
    if find_conversation(meta) is not None or not isinstance(first, str):
        return None
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    asked = questions[int.from_bytes(digest, "little") % len(questions)]
    return {**meta, "conversations": make_turns((asked, first.strip()))}
