"""Ranks that meet without waiting for those that do not come: a store, gates with a time limit, and work that may be left behind."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Iterable
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistError, PrefixStore, TCPStore

from onellm_dist.common.errors import OneLLMError
from onellm_dist.launch.ranks import Ranks

T = TypeVar("T")
POLL_S = 0.05
GRACE_S = 5.0
"""How much longer than a phase's limit its end is waited for."""


class Meeting:
    """One rank's end of the store. Rank 0 decides who takes part in what; nobody waits longer than told.

    Args:
        agent: torchrun holds the store itself; rank 0 then only joins.

    Raises:
        OneLLMError: rank 0 does not answer in time.
    """

    def __init__(self, ranks: Ranks, wait: float, *, agent: bool = False) -> None:
        self.rank, self.world = ranks.rank, ranks.world_size
        self._place = (ranks.address, ranks.port, agent)
        self._store = PrefixStore(
            "preflight", self._connect(wait, hold=ranks.rank == 0 and not agent)
        )

    def _connect(self, wait: float, *, hold: bool) -> TCPStore:
        address, port, _ = self._place
        try:
            return TCPStore(
                address, port, None, hold, timeout=timedelta(seconds=wait), wait_for_workers=False
            )
        except (DistError, RuntimeError) as error:
            raise OneLLMError(
                f"rank 0 does not answer at {address}:{port} within {wait:.0f} s ({_first_line(error)})",
                "the ranks meet there.",
                "see whether rank 0's node is up and reaches this one; MASTER_ADDR and MASTER_PORT name the place.",
            ) from None

    def another(self, wait: float) -> TCPStore:
        """A second connection, for a process group: a blocked one holds its connection."""
        return self._connect(wait, hold=False)

    def put(self, key: str, value: Any) -> None:
        """Leave `value` (JSON) for others."""
        self._store.set(key, json.dumps(value))

    def get(self, key: str, wait: float) -> Any:
        """What somebody left at `key`.

        Raises:
            TimeoutError: nobody did in time, or rank 0 is gone.
        """
        deadline = time.monotonic() + wait
        try:
            while not self._store.check([key]):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no word of {key!r} within {wait:.0f} s")
                time.sleep(POLL_S)
            return json.loads(self._store.get(key))
        except (DistError, RuntimeError) as error:
            raise TimeoutError(f"rank 0 is gone ({_first_line(error)})") from None

    def collect(self, key: str, ranks: Iterable[int], wait: float) -> dict[int, Any]:
        """What each of `ranks` left at `key/RANK` in time; those that left nothing are not in it."""
        left, found = set(ranks), dict[int, Any]()
        deadline = time.monotonic() + wait
        while left:
            for rank in sorted(left):
                if self._store.check([f"{key}/{rank}"]):
                    found[rank] = json.loads(self._store.get(f"{key}/{rank}"))
            left -= found.keys()
            if not left or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        return found

    def gate(
        self, phase: str, present: Collection[int], wait: float, *, fit: bool = True
    ) -> tuple[list[int], list[int]]:
        """Everyone of `present` meets here.

        Args:
            fit: whether this rank can take part in collectives.

        Returns:
            The ranks that came in time (the others are left behind, also if they come later), and those of them that are fit.

        Raises:
            TimeoutError: rank 0 is gone.
        """
        self.put(f"at/{phase}/{self.rank}", fit)
        if self.rank == 0:
            came = self.collect(
                f"at/{phase}", present, wait + 2 * GRACE_S
            )  # work may take `wait` and one grace
            self.put(
                f"go/{phase}", [sorted(came), sorted(rank for rank, able in came.items() if able)]
            )
        came_in_time, able = self.get(
            f"go/{phase}", 2 * wait + 5 * GRACE_S
        )  # rank 0 may be late itself, and then waits
        return came_in_time, able


class Overdue(Exception):
    """Work that was not done in time; it goes on in its thread until the process ends."""


def within(limit: float, work: Callable[[], T]) -> T:
    """`work()`, but at most `limit` seconds of it: a stuck file system or collective must not hold up the rest.

    Raises:
        Overdue: it is not done.
        Exception: whatever `work` raised.
    """
    box: list[tuple[T]] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            box.append((work(),))
        except BaseException as error:  # handed to the caller below
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    if failure:
        raise failure[0]
    if not box:
        raise Overdue(f"not done within {limit:.0f} s")
    return box[0][0]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
