"""Work in processes that can be killed: a stuck collective ends with its process."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from onellm_dist.common.error_text import get_first_line
from onellm_dist.common.processes import kill_with_parent
from onellm_dist.diagnostics.preflight.rendezvous import TimeLimitError

POLL_S = 0.02
KILL_S = 2.0
"""How long a process may take to be killed before it is abandoned."""

Work = Callable[[str, Sequence[int]], Any]
"""(name, ranks) -> a small JSON value."""


class KillableWorker:
    """Does work in a fresh child process each time.

    The children are forked by a process that is itself forked here: it has the imports and never
    uses a GPU, because a process that uses CUDA cannot be forked. Therefore create the worker in
    the main thread, before CUDA is used.

    Args:
        work: what a child does.
    """

    def __init__(self, work: Work) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._number = 0
        self._unread = b""
        rank = os.getpid()
        if os.fork() == 0:
            os.close(self._requests)
            os.close(self._answers)
            _serve(rank, requests, answers, work)
        os.close(requests)
        os.close(answers)

    def run(self, name: str, ranks: Sequence[int], limit: float) -> Any:
        """Run `work(name, ranks)` in its own process, which is killed after `limit` seconds.

        One call at a time.

        Raises:
            TimeLimitError: it did not finish in time.
            RuntimeError: it raised, or its process ended; with the reason.
        """
        self._number += 1
        request = json.dumps([self._number, name, list(ranks), limit])
        os.write(self._requests, request.encode() + b"\n")
        deadline = time.monotonic() + limit + KILL_S
        while True:
            line = self._read_line(deadline)
            if line is None or line[:2] == [self._number, "overdue"]:
                raise TimeLimitError(f"not done within {limit:.0f} s")
            number, outcome, value = line
            if number != self._number:  # the end of an earlier call
                continue
            if outcome == "done":
                return value
            raise RuntimeError(value)

    def _read_line(self, deadline: float) -> list[Any] | None:
        while b"\n" not in self._unread:
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([self._answers], [], [], left)
            if not ready:
                return None
            more = os.read(self._answers, 1 << 16)
            if not more:
                raise RuntimeError("the process that starts the work is gone")
            self._unread += more
        text, self._unread = self._unread.split(b"\n", 1)
        line: list[Any] = json.loads(text)
        return line


def _serve(rank: int, requests: int, answers: int, work: Work) -> NoReturn:
    """Start a child for each request, one at a time, until the rank is gone."""
    kill_with_parent(rank)
    own = os.getpid()

    def answer(*line: Any) -> None:
        os.write(answers, json.dumps(line).encode() + b"\n")  # short enough to be atomic

    with os.fdopen(requests, encoding="utf-8") as lines:
        for line in lines:
            number, name, ranks, limit = json.loads(line)
            child = os.fork()
            if child == 0:
                kill_with_parent(own)
                try:
                    answer(number, "done", work(name, ranks))
                except Exception as error:  # whatever NCCL or gloo raise is the result
                    answer(number, "failed", get_first_line(error))
                os._exit(0)
            code = _wait(child, limit)
            if code is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                answer(number, "overdue", None)
            elif code < 0:
                name = signal.Signals(-code).name
                answer(number, "failed", f"its process was ended by {name}")
            else:
                answer(number, "failed", f"its process ended ({code})")
    os._exit(0)


def _wait(child: int, limit: float) -> int | None:
    """The child's exit code (negative: the signal), or None if it has not ended in time."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL_S)
    return None
