"""Work in processes that can be killed: a collective that hangs goes with its process, and the next try has a fresh one."""

from __future__ import annotations

import json
import os
import select
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from onellm_dist.diagnostics.preflight.rendezvous import Overdue
from onellm_dist.launch.local import kill_with_parent

POLL_S = 0.02
KILL_S = 2.0
"""What a process may take to be killed, before it is left behind."""


class Tries:
    """Does `work` in a child process each time.

    The children are forked by a process that is forked here: it has the imports, and never touches a GPU (CUDA cannot be forked). So
    make it in the main thread, before CUDA is used.

    Args:
        work: (name, ranks) -> a small JSON value.
    """

    def __init__(self, work: Callable[[str, Sequence[int]], Any]) -> None:
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._number, self._unread = 0, b""
        rank = os.getpid()
        if os.fork() == 0:
            os.close(self._requests)
            os.close(self._answers)
            _serve(rank, requests, answers, work)
        os.close(requests)
        os.close(answers)

    def do(self, name: str, ranks: Sequence[int], limit: float) -> Any:
        """`work(name, ranks)` in a process of its own, which is killed after `limit` seconds. One try at a time.

        Raises:
            Overdue: it is not done.
            RuntimeError: it raised, or its process ended; with the reason.
        """
        self._number += 1
        os.write(
            self._requests, json.dumps([self._number, name, list(ranks), limit]).encode() + b"\n"
        )
        deadline = time.monotonic() + limit + KILL_S
        while True:
            line = self._line(deadline)
            if line is None or line[:2] == [self._number, "overdue"]:
                raise Overdue(f"not done within {limit:.0f} s")
            number, kind, value = line
            if number != self._number:  # the end of an earlier try
                continue
            if kind == "done":
                return value
            raise RuntimeError(value)

    def _line(self, deadline: float) -> list[Any] | None:
        while b"\n" not in self._unread:
            ready, _, _ = select.select(
                [self._answers], [], [], max(0.0, deadline - time.monotonic())
            )
            if not ready:
                return None
            more = os.read(self._answers, 1 << 16)
            if not more:
                raise RuntimeError("the process that makes the tries is gone")
            self._unread += more
        line, self._unread = self._unread.split(b"\n", 1)
        found: list[Any] = json.loads(line)
        return found


def _serve(
    rank: int, requests: int, answers: int, work: Callable[[str, Sequence[int]], Any]
) -> NoReturn:
    """The process that makes the tries, one at a time, until the rank is gone."""
    kill_with_parent(rank)
    own = os.getpid()

    def answer(*line: Any) -> None:
        os.write(answers, json.dumps(line).encode() + b"\n")  # short enough to be written whole

    with os.fdopen(requests, encoding="utf-8") as lines:
        for line in lines:
            number, name, ranks, limit = json.loads(line)
            child = os.fork()
            if child == 0:
                kill_with_parent(own)
                try:
                    answer(number, "done", work(name, ranks))
                except Exception as error:  # whatever NCCL or gloo say is the finding
                    answer(number, "failed", first_line(error))
                os._exit(0)
            code = _wait(child, limit)
            if code is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                answer(number, "overdue", None)
                continue
            answer(
                number,
                "failed",
                f"its process was ended by {signal.Signals(-code).name}"
                if code < 0
                else f"its process ended ({code})",
            )
    os._exit(0)


def _wait(child: int, limit: float) -> int | None:
    """Its exit code (negative: the signal), or None where it has not ended in time."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(POLL_S)
    return None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for a line of a table."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200] or type(error).__name__
