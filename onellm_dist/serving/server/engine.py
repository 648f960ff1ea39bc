"""The thread that owns the model: it takes waiting requests and answers them together."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from onellm_dist.common.logging import get_logger
from onellm_dist.model.adapters.adapter_set import AdapterSet
from onellm_dist.model.generation.batched import Prompt, check_prompts
from onellm_dist.model.generation.media_cache import MediaCache
from onellm_dist.model.generation.running_batch import BatchStatistics, RunningBatch
from onellm_dist.serving.server.errors import (
    RequestError,
    describe_error,
    make_internal_error,
    make_late_error,
)
from onellm_dist.serving.server.jobs import MOST_SPANS, Job, JobQueue
from onellm_dist.serving.server.media_encoder import MediaEncoder
from onellm_dist.serving.server.metrics import ServerMetrics
from onellm_dist.serving.server.running_answer import RunningAnswer

_log = get_logger(__name__)
_SHARE_THAT_JOINS = 4
"""Where more wait than places are free, they join once a quarter of the places is."""


class AnswerEngine:
    """Answers the requests of a queue together; later ones join between tokens.

    Args:
        model: a OneLLMForConditionalGeneration in evaluation mode.
        tokenizer: its tokenizer.
        end_ids: tokens that end an answer.
        queue: the requests.
        metrics: counted in.
        batch: most requests that are answered together.
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
        self._most = batch
        self._adapters = adapters or AdapterSet(model, ())
        self._adapter = ""  # that of the requests that are being answered
        self._media = MediaCache()  # of all adapters together: its memory is bounded once
        self._statistics = BatchStatistics()
        self._batch = RunningBatch(model, self._media, self._statistics)
        self._answers: list[RunningAnswer] = []  # of the batch's rows
        # Adapters may change what media become: there the engine encodes, with the right one.
        self._encoder = None if self._adapters.names else MediaEncoder(model, queue, self._media)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread, and that which encodes media."""
        if self._encoder is not None:
            self._encoder.start()
        self._thread.start()

    def close(self) -> None:
        """Answer what waits, and end the threads."""
        self._queue.close()
        if self._thread.is_alive():
            self._thread.join()
        if self._encoder is not None:
            self._encoder.join()

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        encodes = self._encoder is None or self._encoder.is_alive
        return self._thread.is_alive() and encodes

    @property
    def encodes_ahead(self) -> bool:
        """Whether media are encoded while answers continue, by a thread of their own."""
        return self._encoder is not None

    def _work(self) -> None:
        while True:
            jobs = self._take()
            if not jobs and not self._answers:
                return
            going = _find_going(jobs)
            try:
                if going:
                    self._join(going)
                self._step()
            except Exception:
                _log.exception("requests failed")
                self._fail(make_internal_error())
                for job in going:
                    job.fail(make_internal_error())

    def _take(self) -> list[Job]:
        """The requests that begin now; where others are being answered, those that may join."""
        if not self._answers:
            return self._queue.take(self._most, self._fits)
        free = self._most - len(self._answers)
        # A prefill of several costs little more than of one, and the answers under way wait for it.
        if free <= 0 or free < min(self._queue.count_ready(), self._most // _SHARE_THAT_JOINS):
            return []
        return self._queue.take_more(free, self._adapter, self._fits)

    def _fits(self, jobs: Sequence[Job]) -> bool:
        spans = sum(len(job.prompt.media) for job in jobs if not job.is_encoded)
        if len(jobs) > 1 and spans > MOST_SPANS:
            return False
        return self._batch.has_room([job.prompt for job in jobs])

    def _join(self, jobs: Sequence[Job]) -> None:
        """Begin to answer requests; where that fails, one at a time."""
        try:
            if not self._answers:
                self._adapter = jobs[0].adapter
                self._adapters.select(self._adapter)
            self._begin(jobs)
        except Exception as error:
            self._begin_alone(jobs, error)

    def _begin_alone(self, jobs: Sequence[Job], error: Exception) -> None:
        """Find the request that keeps the others from being begun, and begin those."""
        for job in jobs:
            fault = error
            if len(jobs) > 1 and not job.started:
                try:
                    self._begin([job])
                    continue
                except Exception as own:
                    fault = own
            job.fail(describe_error(fault))

    def _begin(self, jobs: Sequence[Job]) -> None:
        """Begin to answer requests of the adapter that is answering (the queue does not mix)."""
        check_prompts(self._model, [job.prompt for job in jobs])
        answers = [
            RunningAnswer(job, self._tokenizer, self._end_ids, self._metrics) for job in jobs
        ]
        try:
            self._batch.join([answer.make_row(_name_media(answer.job)) for answer in answers])
        except BaseException:
            for answer in answers:
                answer.close()
            raise
        finally:
            self._count_positions()
        self._metrics.count_batch(len(self._answers) + len(answers))
        self._answers += [answer for answer in answers if not answer.has_ended]

    def _step(self) -> None:
        """Add a token to every answer; where the model fails, all of them do."""
        try:
            self._batch.step()
        except Exception as error:
            self._fail(describe_error(error))
        self._count_positions()
        self._answers = [answer for answer in self._answers if not answer.has_ended]

    def _fail(self, error: RequestError) -> None:
        self._batch.clear()
        for answer in self._answers:
            answer.fail(error)
        self._answers = []

    def _count_positions(self) -> None:
        spent = self._statistics
        self._metrics.count_positions(spent.positions, spent.padding)
        spent.positions = spent.padding = 0


def _find_going(jobs: Sequence[Job]) -> list[Job]:
    """Requests that are still waited for, in time."""
    going: list[Job] = []
    for job in jobs:
        if job.is_cancelled:
            continue
        if job.is_late:
            job.fail(make_late_error())
        else:
            going.append(job)
    return going


def _name_media(job: Job) -> Prompt:
    """The prompt, with the adapter in the keys of its media: it may change what they become."""
    if not job.adapter:  # what the encoder's thread put into the cache has these keys
        return job.prompt
    media = [
        medium if medium.key is None else replace(medium, key=f"{job.adapter} {medium.key}")
        for medium in job.prompt.media
    ]
    return replace(job.prompt, media=media)


def make_deadline(seconds: float) -> float:
    """The `time.monotonic()` that lies so many seconds ahead."""
    return time.monotonic() + seconds
