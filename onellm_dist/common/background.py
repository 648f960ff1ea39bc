"""Calls of something that may fail or block for ever, made in order by a thread of their own."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

PATIENCE_S = 60.0
"""Seconds that a call may take."""
LIMIT = 1000
"""Calls that wait at most."""
OnFailure = Callable[[str, str], None]
"""Called once with the name of a call and its problem; no later call is made."""


class _Call(NamedTuple):
    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class BackgroundCalls:
    """Makes calls in a thread; the first one that fails or takes too long is the last.

    Args:
        name: name of the thread.
        on_failure: called at the failure, in the thread or in the caller's.
        patience: seconds that a call may take.
    """

    def __init__(self, name: str, on_failure: OnFailure, *, patience: float = PATIENCE_S) -> None:
        self._on_failure = on_failure
        self._patience = patience
        self._queue: queue.Queue[_Call | None] = queue.Queue(LIMIT)
        self._running: tuple[str, float] | None = None
        self._lock = threading.Lock()
        self.failed = False
        """Whether a call failed."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> None:
        """Make a call as soon as those before it have ended.

        Args:
            name: what it is called in a message.
            function: what is called.
            arguments: with what.
        """
        self._check()
        if self.failed:
            return
        try:
            self._queue.put_nowait(_Call(name, function, arguments))
        except queue.Full:
            self._fail(name, f"{LIMIT} calls wait for it")

    def close(self) -> None:
        """Wait for every call, as long as each keeps to its time."""
        if self.failed:
            return
        self._queue.put(None)
        while self._thread.is_alive() and not self.failed:
            self._thread.join(0.05)
            self._check()

    def _check(self) -> None:
        running = self._running
        if running is not None and time.monotonic() - running[1] > self._patience:
            self._fail(running[0], f"no answer for {self._patience:g} s")

    def _run(self) -> None:
        while (call := self._queue.get()) is not None:
            if self.failed:
                return
            self._running = call.name, time.monotonic()
            try:
                call.function(*call.arguments)
            except Exception as error:  # of an external service: a lost network, a full account
                self._fail(call.name, f"{type(error).__name__}: {error}")
                return
            finally:
                self._running = None

    def _fail(self, name: str, problem: str) -> None:
        with self._lock:
            if self.failed:
                return
            self.failed = True
        self._on_failure(name, problem)
