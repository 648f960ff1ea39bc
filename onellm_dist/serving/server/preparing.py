"""How many requests are prepared at once, and how long each may take."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from onellm_dist.serving.server.errors import RequestError, make_busy_error

Prepared = TypeVar("Prepared")


class PreparationGate:
    """Lets a number of requests read their media at once; others wait, and too many are refused.

    Args:
        at_once: requests that are prepared at once.
        waiting: most requests that wait for that.
        seconds: longest time that a request waits for its turn, and then takes.
    """

    def __init__(self, at_once: int, waiting: int, seconds: float) -> None:
        self._turns = asyncio.Semaphore(at_once)
        self._most_waiting = waiting
        self._seconds = seconds
        self.waiting = 0
        """Requests that wait to be prepared."""

    async def run(self, work: Coroutine[Any, Any, Prepared]) -> Prepared:
        """Prepare a request in its turn.

        Args:
            work: prepares it; it is cancelled at the deadline, and with the caller.

        Raises:
            RequestError: too many requests wait, or its time is over.
        """
        try:
            await self._enter()
            try:
                return await asyncio.wait_for(work, self._seconds)
            finally:
                self._turns.release()
        except asyncio.TimeoutError:
            raise RequestError(
                f"the media of the request could not be read within {self._seconds:g} s; send "
                "fewer or smaller ones",
                status=504,
                kind="timeout_error",
            ) from None
        finally:
            work.close()  # where it was never begun

    async def _enter(self) -> None:
        """Wait for a turn.

        Raises:
            RequestError: too many wait, or it takes too long.
        """
        if self.waiting >= self._most_waiting:
            raise make_busy_error("too many requests wait to be prepared")
        self.waiting += 1
        try:
            await asyncio.wait_for(self._turns.acquire(), self._seconds)
        except asyncio.TimeoutError:
            raise make_busy_error(
                f"the request waited {self._seconds:g} s for others to be prepared"
            ) from None
        finally:
            self.waiting -= 1
