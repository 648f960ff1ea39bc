"""The thread that owns the model: it takes waiting requests and answers them in batches."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.logging import get_logger
from onellm_dist.model.adapter_set import AdapterSet
from onellm_dist.model.batched_generation import BatchStatistics, Prompt, generate_batch
from onellm_dist.model.media_cache import MediaCache
from onellm_dist.serving.answer_text import AnswerText
from onellm_dist.serving.server.errors import RequestError, make_internal_error, make_late_error
from onellm_dist.serving.server.jobs import Ending, Job, JobQueue, Piece, TokenRecord
from onellm_dist.serving.server.metrics import ServerMetrics

_log = get_logger(__name__)


class AnswerEngine:
    """Answers the requests of a queue, one batch after the other.

    Args:
        model: a OneLLMForConditionalGeneration in evaluation mode.
        tokenizer: its tokenizer.
        end_ids: tokens that end an answer.
        queue: the requests.
        metrics: counted in.
        batch: most requests of a batch.
        adapters: of the model, of which a request may name one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        end_ids: Sequence[int],
        queue: JobQueue,
        metrics: ServerMetrics,
        batch: int,
        adapters: AdapterSet | None = None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._end_ids = tuple(end_ids)
        self._queue = queue
        self._metrics = metrics
        self._batch = batch
        self._adapters = adapters or AdapterSet(model, ())
        self._media = MediaCache()  # of all adapters together: its memory is bounded once
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        self._queue.close()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    def _work(self) -> None:
        while jobs := self._queue.take(self._batch):
            try:
                self._answer(jobs)
            except Exception:
                _log.exception("a batch of requests failed")
                for job in jobs:
                    job.send(make_internal_error())

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Answer requests together; where that fails, one at a time."""
        going = [job for job in jobs if not job.is_cancelled]
        for job in going:
            if job.is_late:
                job.send(make_late_error())
        going = [job for job in going if not job.is_late]
        if not going:
            return
        self._metrics.start_batch(len(going))
        try:
            self._run(going)
        except Exception as error:
            self._answer_alone(going, error)
        finally:
            self._metrics.end_batch()

    def _answer_alone(self, jobs: Sequence[Job], error: Exception) -> None:
        """Find the request that made its batch fail, and answer the others."""
        for job in jobs:
            if len(jobs) > 1 and not job.started:
                try:
                    self._run([job])
                    continue
                except Exception as own:
                    error = own
            if isinstance(error, OneLLMError):
                job.send(RequestError.from_error(error))
            else:
                _log.error("a request failed", exc_info=error)
                job.send(make_internal_error())

    def _run(self, jobs: Sequence[Job]) -> None:
        rows = [_RunningAnswer(job, self._tokenizer, self._end_ids, self._metrics) for job in jobs]
        self._adapters.select(jobs[0].adapter)  # of all: the queue does not mix them
        wants_logits = any(job.top_logprobs is not None for job in jobs)
        statistics = BatchStatistics()
        try:
            generate_batch(
                self._model,
                [_name_media(job) for job in jobs],
                end_ids=self._end_ids,
                on_token=lambda place, token: rows[place].add(token),
                on_logits=(lambda place, logits: rows[place].see(logits)) if wants_logits else None,
                stop=lambda place, _: rows[place].has_ended,
                batch=self._batch,
                media_cache=self._media,
                statistics=statistics,
            )
        finally:
            self._metrics.count_positions(statistics.positions, statistics.padding)


def _name_media(job: Job) -> Prompt:
    """The prompt, with the adapter in the keys of its media: it may change what they become."""
    media = [
        medium if medium.key is None else replace(medium, key=f"{job.adapter} {medium.key}")
        for medium in job.prompt.media
    ]
    return replace(job.prompt, media=media)


class _RunningAnswer:
    """A request while its tokens come."""

    def __init__(
        self, job: Job, tokenizer: Any, end_ids: Sequence[int], metrics: ServerMetrics
    ) -> None:
        self.has_ended = False
        """Whether the answer is complete, or nobody waits for it."""
        self._job = job
        self._end_ids = frozenset(end_ids)
        self._metrics = metrics
        self._text = AnswerText(tokenizer, job.stops)
        self._records: list[TokenRecord] = []
        self._logits: torch.Tensor | None = None
        self._tokens = 0

    def see(self, logits: torch.Tensor) -> None:
        """Keep the logits that the next token is chosen by."""
        self._logits = logits if self._job.top_logprobs is not None else None

    def add(self, token: int) -> None:
        """Send what a token adds to the answer, and its end if it ends it."""
        job = self._job
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
            self._end()
            self._send(self._text.finish(), is_last=True)
            job.send(Ending("stop" if stops else "length", self._tokens))

    def _end(self) -> None:
        self.has_ended = True
        self._metrics.add_answer(self._job.prompt.positions, self._tokens)

    def _send(self, text: str, *, is_last: bool = False) -> None:
        if text or (is_last and self._records):
            self._job.send(Piece(text, tuple(self._records)))
            self._records = []


def _record(logits: torch.Tensor, token: int, top: int) -> TokenRecord:
    """How likely a token was: [V] logits at temperature 1, before sampling."""
    shares = torch.log_softmax(logits.float(), -1)
    values, ids = shares.topk(min(top, len(shares))) if top else (shares[:0], shares[:0])
    likeliest = zip(ids.tolist(), values.tolist(), strict=True)
    return TokenRecord(
        token, max(float(shares[token]), -9999.0), tuple((int(i), float(v)) for i, v in likeliest)
    )


def make_deadline(seconds: float) -> float:
    """The `time.monotonic()` that lies so many seconds ahead."""
    return time.monotonic() + seconds
