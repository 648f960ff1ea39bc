"""A request while its tokens come: what is sent of each, and where the answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from onellm_dist.model.generation.rows import AnswerRow, Prompt
from onellm_dist.serving.answer_text import AnswerText
from onellm_dist.serving.server.errors import RequestError, describe_error, make_late_error
from onellm_dist.serving.server.jobs import Ending, Job, Piece, TokenRecord
from onellm_dist.serving.server.metrics import ServerMetrics


class RunningAnswer:
    """A request while its tokens come; the metrics count it as running until it ends.

    Args:
        job: the request.
        tokenizer: the tokenizer of the LLM.
        end_ids: tokens that end an answer.
        metrics: counted in.
    """

    def __init__(
        self, job: Job, tokenizer: Any, end_ids: Sequence[int], metrics: ServerMetrics
    ) -> None:
        self.has_ended = False
        """Whether the answer is complete, or nobody waits for it."""
        self.job = job
        """The request."""
        self._end_ids = frozenset(end_ids)
        self._metrics = metrics
        self._text = AnswerText(tokenizer, job.stops)
        self._records: list[TokenRecord] = []
        self._logits: torch.Tensor | None = None
        self._tokens = 0
        metrics.running.inc()

    def make_row(self, prompt: Prompt) -> AnswerRow:
        """The row of a batch that answers the request.

        Args:
            prompt: the request's, with the keys of its media.
        """
        return AnswerRow(
            0,
            prompt,
            tuple(self._end_ids),
            stop=lambda *_: self.has_ended,
            on_token=lambda _, token: self.add(token),
            on_logits=None if self.job.top_logprobs is None else lambda _, seen: self.see(seen),
            on_error=lambda _, error: self.fail(describe_error(error)),
        )

    def close(self) -> None:
        """Stop counting the answer as running; does nothing once it has ended."""
        if not self.has_ended:
            self.has_ended = True
            self._metrics.running.dec()

    def fail(self, error: RequestError) -> None:
        """End the answer with an error; does nothing once it has ended."""
        self.job.started = True  # it is not begun again
        if not self.has_ended:
            self.close()
            self.job.fail(error)

    def see(self, logits: torch.Tensor) -> None:
        """Keep the logits that the next token is chosen by."""
        self._logits = logits

    def add(self, token: int) -> None:
        """Send what a token adds to the answer, and its end if it ends it."""
        job = self.job
        job.started = True
        self._tokens += 1
        if job.is_cancelled:
            self._end()
            return
        if job.is_late:
            self._end()
            job.send(make_late_error())
            return
        if self._logits is not None:
            self._records.append(_record(self._logits, token, job.top_logprobs or 0))
        self._send(self._text.add(token))
        stops = token in self._end_ids or self._text.stopped
        if stops or self._tokens >= job.prompt.max_new_tokens:
            last = self._text.finish()
            self._end()
            self._send(last, is_last=True)
            job.send(Ending("stop" if stops else "length", self._tokens))

    def _end(self) -> None:
        self.close()
        self._metrics.count_tokens(self.job.prompt.positions, self._tokens)

    def _send(self, text: str, *, is_last: bool = False) -> None:
        if text or (is_last and self._records):
            self.job.send(Piece(text, tuple(self._records)))
            self._records = []


def _record(logits: torch.Tensor, token: int, top: int) -> TokenRecord:
    """How likely a token was: [V] logits at temperature 1, before sampling."""
    shares = torch.log_softmax(logits.float(), -1)
    values, ids = shares.topk(min(top, len(shares))) if top else (shares[:0], shares[:0])
    likeliest = zip(ids.tolist(), values.tolist(), strict=True)
    return TokenRecord(
        token, max(float(shares[token]), -9999.0), tuple((int(i), float(v)) for i, v in likeliest)
    )
