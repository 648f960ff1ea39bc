"""Requests that wait for their answers, and the queue in which they wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from onellm_dist.common.logging import get_logger
from onellm_dist.model.generation.batched import Prompt

_log = get_logger(__name__)
JOIN_WAIT_S = 0.005
"""Seconds that a first request waits for others to be answered with it."""


MOST_SPANS = 16
"""Media spans that are encoded at once, but for those of one request."""
_MOST_AHEAD = 64
"""Spans that are encoded before an answer begins; more could push each other out of the cache."""


class QueueFullError(Exception):
    """More requests wait than the server allows."""


@dataclass(frozen=True)
class TokenRecord:
    """A token of an answer, and how likely it and others were.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability.
        top: (id, logprob) of the likeliest tokens.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one token added to an answer.

    Attributes:
        text: text that can be shown now.
        records: tokens since the last piece, where their probabilities were asked for.
    """

    text: str
    records: tuple[TokenRecord, ...] = ()


@dataclass(frozen=True)
class Ending:
    """How an answer ended.

    Attributes:
        reason: `stop` or `length`.
        tokens: number of new tokens.
    """

    reason: str
    tokens: int


Event = Piece | Ending | Exception


@dataclass
class Job:
    """A request that is answered.

    Attributes:
        prompt: what the model continues.
        stops: strings that end the answer.
        top_logprobs: how many likeliest tokens are recorded with each; None: none, nor its own.
        deadline: `time.monotonic()` at which it is given up.
        send: called in the engine's thread with each event; the last is an Ending or an exception.
        adapter: name of the adapter that answers; "": the base alone.
        started: whether its answer has begun.
        is_held: whether it waits in the queue until its media are encoded.
        is_encoded: whether its media were encoded while it waited.
    """

    prompt: Prompt
    stops: tuple[str, ...]
    top_logprobs: int | None
    deadline: float
    send: Callable[[Event], None]
    adapter: str = ""
    started: bool = False
    is_held: bool = False
    is_encoded: bool = False
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _wake: list[Callable[[], None]] = field(default_factory=list)

    def cancel(self) -> None:
        """Give the request up; its place is free with the next token."""
        self._cancelled.set()
        for wake in self._wake:
            wake()

    def fail(self, error: Exception) -> None:
        """End the request with an error; one that cannot be sent is logged, and harms no other.

        Args:
            error: what its client gets.
        """
        try:
            self.send(error)
        except Exception:
            _log.exception("an error could not be sent to its client: %s", error)

    def on_cancel(self, wake: Callable[[], None]) -> None:
        """Call something when the request is given up, or now if it was.

        Args:
            wake: called in the thread that gives it up.
        """
        self._wake.append(wake)
        if self.is_cancelled:
            wake()

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._cancelled.is_set()

    @property
    def is_late(self) -> bool:
        """Whether the job's time is over."""
        return time.monotonic() > self.deadline


Fits = Callable[[Sequence[Job]], bool]


class JobQueue:
    """Requests in the order in which they came.

    Args:
        limit: most requests that wait.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: list[Job] = []
        self._change = threading.Condition()
        self._closed = False
        self.holds_media = False
        """Whether requests with media wait until `release` lets them go."""

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, job: Job) -> None:
        """Add a request.

        Raises:
            QueueFullError: as many wait as may, or the server ends.
        """
        with self._change:
            if self._closed or len(self._waiting) >= self._limit:
                raise QueueFullError
            job.is_held = self.holds_media and bool(job.prompt.media)
            self._waiting.append(job)
            self._change.notify_all()

    def discard(self, job: Job) -> None:
        """Remove a request that waits; nothing happens if it does not."""
        with self._change:
            if any(waiting is job for waiting in self._waiting):
                self._waiting = [waiting for waiting in self._waiting if waiting is not job]
                self._change.notify_all()

    def wait_for_media(self) -> list[Job]:
        """Wait for requests that are held, and return the oldest; they stay in the queue.

        Returns:
            Requests with `MOST_SPANS` media spans together, or one with more; empty: the queue is
            closed and none is held.
        """
        with self._change:
            self._change.wait_for(self._can_encode)
            found: list[Job] = []
            spans = 0
            for job in self._waiting:
                spans += len(job.prompt.media) if job.is_held else 0
                if found and spans > MOST_SPANS:
                    break
                if job.is_held:
                    found.append(job)
            return found

    def release(self, jobs: Sequence[Job]) -> None:
        """Let requests go whose media have been encoded.

        Args:
            jobs: the requests.
        """
        with self._change:
            for job in jobs:
                job.is_held = False
            self._change.notify_all()

    def take(self, most: int, fits: Fits = lambda _: True) -> list[Job]:
        """Wait for requests, and take those that are answered together.

        The first one has waited longest; the others are those of its adapter nearest to its length,
        so that rows of a batch are alike.

        Args:
            most: most requests.
            fits: whether some requests can be answered together; a single one can.

        Returns:
            The requests; empty: the queue is closed and nobody waits.
        """
        with self._change:
            while True:
                self._change.wait_for(self._can_take)
                if self.count_ready() < most and not self._closed:
                    self._change.wait_for(
                        lambda: self.count_ready() >= most or self._closed, timeout=JOIN_WAIT_S
                    )
                taken = self._take(most, fits)
                if taken or (self._closed and not self._waiting):
                    return taken  # else all clients have left meanwhile

    def take_more(self, most: int, adapter: str, fits: Fits) -> list[Job]:
        """Take requests that can join those that are being answered; does not wait.

        If the one that has waited longest cannot, no other overtakes it.

        Args:
            most: most requests.
            adapter: name of the adapter that is answering.
            fits: whether some requests can join.
        """
        with self._change:
            first = [job for job in self._waiting if not job.is_held][:1]
            if not first or first[0].adapter != adapter or not fits(first):
                return []
            return self._take(most, fits)

    def count_ready(self) -> int:
        """Requests that can be taken."""
        return sum(not job.is_held for job in self._waiting)

    def _can_take(self) -> bool:
        return self.count_ready() > 0 or (self._closed and not self._waiting)

    def _can_encode(self) -> bool:
        if all(not job.is_held for job in self._waiting):
            return self._closed
        ahead = sum(len(job.prompt.media) for job in self._waiting if not job.is_held)
        return ahead < _MOST_AHEAD

    def _take(self, most: int, fits: Fits) -> list[Job]:
        free = [job for job in self._waiting if not job.is_held]
        if not free:
            return []
        first, *later = free
        others = [job for job in later if job.adapter == first.adapter]
        others.sort(key=lambda job: abs(_count(job) - _count(first)))
        taken = [first]
        for job in others:
            if len(taken) >= most:
                break
            if fits([*taken, job]):  # else one behind it may fit, as a text behind many media
                taken.append(job)
        chosen = {id(job) for job in taken}
        self._waiting = [job for job in self._waiting if id(job) not in chosen]
        self._change.notify_all()
        return taken

    def close(self) -> None:
        """Take no more requests; those that wait are still answered."""
        with self._change:
            self._closed = True
            self._change.notify_all()


def _count(job: Job) -> int:
    """Positions of a prompt and its longest answer."""
    return job.prompt.positions + job.prompt.max_new_tokens
