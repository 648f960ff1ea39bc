"""Conversations as the messages of a request, and prompts as people read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from onellm_dist.modalities import SPAN_TOKENS
from onellm_dist.model.generation.batched import Prompt
from onellm_dist.model.processing.content_parts import OWN_TYPE
from onellm_dist.serving.chat.pictures import KEPT_SECONDS
from onellm_dist.serving.chat.session import ChatError, ChatMedium, ChatTurn


def make_messages(system: str, turns: Sequence[ChatTurn], megabytes: int) -> list[dict[str, Any]]:
    """Make the messages of a request; its content parts hold the bytes of files.

    Args:
        system: what the model reads before all turns; empty: nothing.
        turns: the turns; the last one has no answer yet.
        megabytes: most bytes of all files together, in MiB.

    Raises:
        ChatError: a file is gone, or they are too large.
    """
    left = megabytes << 20
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns, start=1):
        parts: list[dict[str, Any]] = []
        for medium in turn.media:
            files = read_medium(medium)
            left -= sum(map(len, files.values()))
            if left < 0:
                raise ChatError(
                    f"The files of this conversation are larger than {megabytes} MiB together. "
                    "Start a new one, or send smaller files."
                )
            parts.append({"type": OWN_TYPE, "modality": medium.modality, "parts": files})
        messages.append(
            {"role": "user", "content": [*parts, {"type": "text", "text": turn.question}]}
        )
        if number < len(turns):
            messages.append({"role": "assistant", "content": turn.answer})
    return messages


def read_medium(medium: ChatMedium) -> dict[str, bytes]:
    """The modality's part -> the bytes of its file.

    Raises:
        ChatError: a file is gone.
    """
    try:
        return {role: path.read_bytes() for role, path in medium.files.items()}
    except OSError as error:
        raise ChatError(
            f"{medium.name} cannot be read any more ({error.strerror}); files are kept for "
            f"{KEPT_SECONDS // 3600} hours. Start a new conversation."
        ) from None


def describe_prompt(tokenizer: Any, prompt: Prompt) -> str:
    """Say what the model continues: the text with its special tokens, and where spans stand.

    Args:
        tokenizer: the tokenizer of the LLM.
        prompt: the prompt.
    """
    return "".join(_describe_pieces(tokenizer, prompt))


def _describe_pieces(tokenizer: Any, prompt: Prompt) -> Iterator[str]:
    ids = list(prompt.ids)
    text, done = str(tokenizer.decode(ids)), 0
    places = prompt.places or (1,) * len(prompt.media)
    for medium, place in zip(prompt.media, places, strict=True):
        # Cut out of the whole: a part alone may lose the blank that it begins with.
        end = max(done, len(tokenizer.decode(ids[:place])))
        yield text[done:end]
        yield f"⟨{medium.modality}: {SPAN_TOKENS} positions⟩"
        done = end
    yield text[done:]
