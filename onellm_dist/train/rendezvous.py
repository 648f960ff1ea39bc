"""Where the ranks meet: a store that rank 0 holds, and who is still missing there."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta

from torch.distributed import DistError, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

from onellm_dist.common.counts import format_count
from onellm_dist.common.error_text import get_first_line
from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.logging import get_logger
from onellm_dist.launch.ranks import Ranks

log = get_logger(__name__)
LOOPBACK = "127.0.0.1"
ONE_MACHINE_S = 300.0
"""Seconds that ranks of one machine wait for each other: something has started them together."""
MACHINES_S = 900.0
"""Seconds that ranks of several machines wait: imports may take minutes on a cold network disk."""
FIRST_WORD_S = 5.0
"""Seconds after which a rank says whom it waits for; after that, once a minute."""
SHOWN_RANKS = 8
POLL_S = 0.1


def meet(ranks: Ranks, timeout: timedelta, *, patience_s: float | None = None) -> Store:
    """Meet the other ranks.

    The store of ranks on one machine listens on the loopback interface alone.

    Args:
        ranks: this process's place in the run.
        timeout: of later waits on the store.
        patience_s: seconds to wait; default: `ONE_MACHINE_S` or `MACHINES_S`.

    Returns:
        The store, for the process group.

    Raises:
        OneLLMError: a rank did not come in time, or rank 0's address cannot be used.
    """
    waiting = _Waiting(ranks, patience_s)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address = ranks.address
    if ranks.are_on_one_machine and not agent:
        address = LOOPBACK
    if ranks.rank == 0 and not agent:
        store = host_store(address, ranks.port, timeout)
    else:
        waiting.wait_for_port(address)
        store = TCPStore(address, ranks.port, None, False, timeout, wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    # torchrun's store outlives a start, and nodes that join are not a restart: there are just more.
    joined = PrefixStore(f"onellm/{attempt}/{ranks.world_size}", store)
    try:
        waiting.wait_for_ranks(joined)
    except (DistError, RuntimeError) as error:
        raise OneLLMError(
            f"rank 0 ended while rank {ranks.rank} waited for the other ranks "
            f"({get_first_line(error)})",
            "the ranks meet at its store.",
            "see its own message; it comes first in the job's log.",
        ) from None
    return joined


def count_ranks_here(store: Store, ranks: Ranks) -> int:
    """Ranks on this machine, by the host names that all have left in the store of `meet`."""
    hosts = store.multi_get([f"here/{rank}" for rank in range(ranks.world_size)])
    return hosts.count(hosts[ranks.rank])


def restrict_to_loopback(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that keep the ranks of one machine on its loopback interface.

    What the user has set stays.
    """
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: "lo" for name in names if not env.get(name)}


def host_store(address: str, port: int, timeout: timedelta) -> TCPStore:
    """The store of rank 0. At the loopback address it listens on that interface alone.

    Raises:
        OneLLMError: its port is in use.
    """
    listener = None
    try:
        if address == LOOPBACK:  # torch would listen on all interfaces
            listener = socket.create_server((LOOPBACK, port)).detach()  # the store closes it
        return TCPStore(
            address,
            port,
            None,
            True,
            timeout,
            wait_for_workers=False,
            master_listen_fd=listener,
        )
    except (DistError, RuntimeError, OSError) as error:
        raise OneLLMError(
            f"rank 0 cannot listen on port {port}: {get_first_line(error)}",
            "the ranks meet there (MASTER_PORT); another process may use it, perhaps a rank of an "
            "earlier start.",
            "end that process, or choose another MASTER_PORT.",
        ) from None


class _Waiting:
    """A wait for other ranks: says for whom, and gives up."""

    def __init__(self, ranks: Ranks, patience_s: float | None) -> None:
        self._ranks = ranks
        default = ONE_MACHINE_S if ranks.are_on_one_machine else MACHINES_S
        self._patience = default if patience_s is None else patience_s
        self._started = time.monotonic()
        self._next_word = FIRST_WORD_S

    def wait_for_port(self, address: str) -> None:
        """Wait until rank 0 listens."""
        where = f"rank 0 at {address}:{self._ranks.port}"
        problem = ""
        while True:
            try:
                with socket.create_connection((address, self._ranks.port), timeout=5):
                    return
            except OSError as error:
                problem = error.strerror or str(error)
            self._go_on(f"{where} ({problem})")
            time.sleep(POLL_S)

    def wait_for_ranks(self, store: Store) -> None:
        """Wait until every rank is here; rank 0 looks, the others wait for its word."""
        ranks = self._ranks
        store.set(f"here/{ranks.rank}", socket.gethostname())
        if ranks.rank == 0:
            missing = set(range(ranks.world_size))
            while missing:
                missing = {rank for rank in missing if not store.check([f"here/{rank}"])}
                if missing:
                    store.set("missing", _format_ranks(missing))
                    self._go_on(_format_ranks(missing))
                    time.sleep(POLL_S)
            store.set("all", "here")
        while not store.check(["all"]):
            missing_now = "the other ranks"
            with suppress(DistError, RuntimeError):
                if store.check(["missing"]):
                    missing_now = store.get("missing").decode()
            self._go_on(missing_now)
            time.sleep(POLL_S)

    def _go_on(self, missing: str) -> None:
        """Say whom this rank waits for, when it is time to.

        Raises:
            OneLLMError: the wait is over.
        """
        waited = time.monotonic() - self._started
        ranks = self._ranks
        of = f"rank {ranks.rank} of {ranks.world_size}"
        if waited >= self._patience:
            raise OneLLMError(
                f"{of} waited {waited:.0f} s for {missing}",
                f"{self._describe_source()}, and nobody else came.",
                "if this process should train alone, unset these variables; else look in the log "
                "of the missing ranks, and check that their nodes reach MASTER_ADDR.",
            )
        if waited >= self._next_word:
            self._next_word = waited + 60.0
            log.warning(
                "%s waits for %s (%.0f s; it gives up after %.0f s). %s.",
                of,
                missing,
                waited,
                self._patience,
                self._describe_source(),
            )

    def _describe_source(self) -> str:
        source = self._ranks.source or "the launcher"
        be = "is" if self._ranks.world_size == 1 else "are"
        return (
            f"That there {be} {format_count(self._ranks.world_size, 'rank')} is what {source} say"
        )


def _format_ranks(ranks: Iterable[int]) -> str:
    found = sorted(ranks)
    more = f" and {len(found) - SHOWN_RANKS} more" if len(found) > SHOWN_RANKS else ""
    word = "rank" if len(found) == 1 else "ranks"
    return f"{word} {', '.join(map(str, found[:SHOWN_RANKS]))}{more}"
