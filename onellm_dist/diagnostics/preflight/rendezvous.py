"""Ranks that meet without waiting for those that do not come.

A store, meeting points with a time limit, and work that may be abandoned.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Iterable
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # not in __all__
from torch.distributed.distributed_c10d import PrefixStore

from onellm_dist.common.error_text import get_first_line
from onellm_dist.common.errors import OneLLMError
from onellm_dist.launch.ranks import Ranks
from onellm_dist.train.rendezvous import LOOPBACK, host_store

T = TypeVar("T")
POLL_S = 0.05
GRACE_S = 5.0
"""How much longer than a phase's limit its end is awaited."""


class Rendezvous:
    """One rank's connection to the store.

    Rank 0 decides who takes part in what; nobody waits longer than asked to.

    Args:
        ranks: this rank and the address of the store.
        wait: seconds to wait for rank 0.
        agent: torchrun holds the store itself; rank 0 then only joins.

    Raises:
        OneLLMError: rank 0 does not answer in time.
    """

    def __init__(self, ranks: Ranks, wait: float, *, agent: bool = False) -> None:
        self.rank = ranks.rank
        local = ranks.are_on_one_machine and not agent
        self._address = LOOPBACK if local else ranks.address
        self._port = ranks.port
        host = ranks.rank == 0 and not agent
        self._store = PrefixStore("preflight", self._connect(wait, host=host))

    def _connect(self, wait: float, *, host: bool) -> TCPStore:
        if host:
            return host_store(self._address, self._port, timedelta(seconds=wait))
        try:
            return TCPStore(
                self._address,
                self._port,
                None,
                False,
                timeout=timedelta(seconds=wait),
                wait_for_workers=False,
            )
        except (DistError, RuntimeError) as error:
            raise OneLLMError(
                f"rank 0 does not answer at {self._address}:{self._port} within {wait:.0f} s "
                f"({get_first_line(error)})",
                "the ranks meet there.",
                "check that rank 0's node is up and reaches this one; MASTER_ADDR and MASTER_PORT "
                "name the address.",
            ) from None

    def open_connection(self, wait: float) -> TCPStore:
        """A second connection, for a process group: a blocked one keeps its connection busy."""
        return self._connect(wait, host=False)

    def put(self, key: str, value: Any) -> None:
        """Leave `value` (JSON) for others."""
        self._store.set(key, json.dumps(value))

    def get(self, key: str, wait: float) -> Any:
        """Wait for the value that somebody leaves at `key`.

        Raises:
            TimeoutError: nobody did in time, or rank 0 is gone.
        """
        deadline = time.monotonic() + wait
        try:
            while not self._store.check([key]):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"nothing at {key!r} within {wait:.0f} s")
                time.sleep(POLL_S)
            return json.loads(self._store.get(key))
        except (DistError, RuntimeError) as error:
            raise TimeoutError(f"rank 0 is gone ({get_first_line(error)})") from None

    def collect(self, key: str, ranks: Iterable[int], wait: float) -> dict[int, Any]:
        """What each rank leaves at `key/RANK` in time; ranks that left nothing are absent."""
        left = set(ranks)
        values = dict[int, Any]()
        deadline = time.monotonic() + wait
        while left:
            for rank in sorted(left):
                if self._store.check([f"{key}/{rank}"]):
                    values[rank] = json.loads(self._store.get(f"{key}/{rank}"))
            left -= values.keys()
            if not left or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        return values

    def meet(
        self, phase: str, present: Collection[int], wait: float, *, fit: bool = True
    ) -> tuple[list[int], list[int]]:
        """Meet all ranks of `present`.

        Args:
            phase: name of the meeting point.
            present: the ranks that are expected.
            wait: seconds that the work before the meeting point may take.
            fit: whether this rank can take part in collectives.

        Returns:
            The ranks that came in time (the others are left behind, even if they come later), and
            those of them that are fit.

        Raises:
            TimeoutError: rank 0 is gone.
        """
        self.put(f"at/{phase}/{self.rank}", fit)
        if self.rank == 0:
            # Work may take `wait` and one grace.
            came = self.collect(f"at/{phase}", present, wait + 2 * GRACE_S)
            able = sorted(rank for rank, is_fit in came.items() if is_fit)
            self.put(f"go/{phase}", [sorted(came), able])
        # Rank 0 may be late itself, and then waits.
        came_in_time, fit_ranks = self.get(f"go/{phase}", 2 * wait + 5 * GRACE_S)
        return came_in_time, fit_ranks


class TimeLimitError(Exception):
    """Work that did not finish in time; it continues in its thread until the process ends."""


def run_within(limit: float, work: Callable[[], T]) -> T:
    """Run `work`, but wait for it at most `limit` seconds.

    A stuck file system or collective must not hold up the rest.

    Raises:
        TimeLimitError: it did not finish.
        Exception: whatever `work` raised.
    """
    results: list[tuple[T]] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append((work(),))
        except BaseException as error:  # raised to the caller below
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    if failures:
        raise failures[0]
    if not results:
        raise TimeLimitError(f"not done within {limit:.0f} s")
    return results[0][0]
