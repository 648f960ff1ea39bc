"""Answers in the form of OpenAI's chat completions, complete or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from onellm_dist.serving.server.chat import RunningChat
from onellm_dist.serving.server.errors import RequestError
from onellm_dist.serving.server.jobs import Ending, Piece, TokenRecord

DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


class CompletionWriter:
    """Writes the answer to one request.

    Args:
        chat: the request.
        tokenizer: the tokenizer of the LLM.
    """

    def __init__(self, chat: RunningChat, tokenizer: Any) -> None:
        self._chat = chat
        self._tokenizer = tokenizer
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        options = chat.request.stream_options
        self._with_usage = options is not None and options.include_usage

    def write_whole(self, pieces: Sequence[Piece], ending: Ending) -> dict[str, Any]:
        """The JSON of a whole answer.

        Args:
            pieces: its text.
            ending: how it ended.
        """
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
        records = [record for piece in pieces for record in piece.records]
        choice = {
            "index": 0,
            "message": message,
            "logprobs": self._write_records(records),
            "finish_reason": ending.reason,
        }
        return {**self._head("chat.completion"), "choices": [choice], "usage": self._usage(ending)}

    def open_stream(self) -> bytes:
        """The first event of a stream: who speaks."""
        return self._write_event({"role": "assistant", "content": ""}, None)

    def write_piece(self, piece: Piece) -> bytes:
        """The event of a piece of the answer."""
        return self._write_event({"content": piece.text}, self._write_records(piece.records))

    def close_stream(self, ending: Ending) -> bytes:
        """The last events of a stream."""
        text = self._write_event({}, None, ending.reason)
        if self._with_usage:
            last = {**self._head("chat.completion.chunk"), "choices": []}
            text += write_event({**last, "usage": self._usage(ending)})
        return text + DONE

    def write_error(self, error: RequestError) -> bytes:
        """The last events of a stream that fails after it has begun."""
        return write_event(error.content) + DONE

    def _write_event(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None = None
    ) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        content = {**self._head("chat.completion.chunk"), "choices": [choice]}
        if self._with_usage:
            content["usage"] = None
        return write_event(content)

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._chat.request.model,
        }

    def _usage(self, ending: Ending) -> dict[str, int]:
        prompt = self._chat.prompt.positions
        return {
            "prompt_tokens": prompt,
            "completion_tokens": ending.tokens,
            "total_tokens": prompt + ending.tokens,
        }

    def _write_records(self, records: Sequence[TokenRecord]) -> dict[str, Any] | None:
        if not self._chat.request.logprobs:
            return None
        return {
            "content": [
                {
                    **self._describe(record.token, record.logprob),
                    "top_logprobs": [self._describe(*other) for other in record.top],
                }
                for record in records
            ],
            "refusal": None,
        }

    def _describe(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8"))}


def write_event(content: dict[str, Any]) -> bytes:
    """One server-sent event.

    Args:
        content: its JSON.
    """
    return f"data: {json.dumps(content, ensure_ascii=True, allow_nan=False)}\n\n".encode("ascii")
