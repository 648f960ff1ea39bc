"""Ranks meet, say for whom they wait, and give up; those of one machine listen to nobody else."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from onellm_dist.common.errors import OneLLMError
from onellm_dist.launch.local import find_free_port
from onellm_dist.launch.ranks import Ranks
from onellm_dist.train import distributed, rendezvous
from onellm_dist.train.rendezvous import count_ranks_here, meet, restrict_to_loopback

TIMEOUT = timedelta(seconds=30)


def make_ranks(rank: int, world_size: int, port: int, local: int | None = None) -> Ranks:
    local_world_size = world_size if local is None else local
    return Ranks(
        rank,
        world_size,
        rank % local_world_size,
        local_world_size,
        "127.0.0.1",
        port,
        "RANK and WORLD_SIZE",
    )


@pytest.fixture(autouse=True)
def early_words(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rendezvous, "FIRST_WORD_S", 0.2)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    logger = logging.getLogger("onellm_dist")
    before, logger.propagate = logger.propagate, True
    yield
    logger.propagate = before


def listening(port: int) -> set[str]:
    return {
        c.laddr.ip
        for c in psutil.Process().net_connections("inet")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == port
    }


def test_ranks_of_one_machine_meet_on_the_loopback_interface_alone() -> None:
    port = find_free_port()
    stores = {}
    threads = [
        threading.Thread(
            target=lambda rank=rank: stores.update({rank: meet(make_ranks(rank, 3, port), TIMEOUT)})
        )
        for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(stores) == [0, 1, 2]
    assert listening(port) == {"127.0.0.1"}
    stores[1].set("x", "y")
    assert stores[2].get("x") == b"y"


def test_the_ranks_of_each_machine_are_counted_by_their_names() -> None:
    port = find_free_port()
    ranks = [
        Ranks(r, 3, r % 2, 1 + r % 2, "localhost", port, local_size_is_known=False)
        for r in range(3)
    ]
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda own: meet(own, TIMEOUT), ranks))
    assert [count_ranks_here(stores[0], own) for own in ranks] == [3, 3, 3]
    stores[1].set("here/2", "another-machine")
    assert [count_ranks_here(stores[0], own) for own in ranks] == [2, 2, 1]


def test_rank_0_names_who_is_missing_at_once_and_gives_up(caplog: pytest.LogCaptureFixture) -> None:
    port = find_free_port()

    def meet_in_vain() -> None:
        with contextlib.suppress(OneLLMError):
            meet(make_ranks(2, 4, port), TIMEOUT, patience_s=4)

    threading.Thread(target=meet_in_vain, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(OneLLMError, match=r"rank 0 of 4 waited .* for ranks 1, 3") as info:
        meet(make_ranks(0, 4, port), TIMEOUT, patience_s=3)
    assert time.monotonic() - started < 20
    assert "RANK and WORLD_SIZE" in info.value.why and "unset" in info.value.do
    assert any("waits for ranks 1" in record.message for record in caplog.records)


def test_a_rank_whose_rank_0_never_comes_says_so_and_gives_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    port = find_free_port()
    with pytest.raises(OneLLMError, match=f"for rank 0 at 127.0.0.1:{port} .Connection refused"):
        meet(make_ranks(1, 2, port), TIMEOUT, patience_s=0.5)
    assert any("waits for rank 0" in record.message for record in caplog.records)


def test_a_host_that_has_no_address_is_named() -> None:
    ranks = Ranks(1, 2, 0, 1, "no-such-host.invalid", find_free_port())
    with pytest.raises(OneLLMError, match=r"no-such-host\.invalid"):
        meet(ranks, TIMEOUT, patience_s=0.3)


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(OneLLMError, match=f"cannot listen on port {port}"):
            meet(make_ranks(0, 1, port), TIMEOUT)


def test_several_machines_wait_longer_than_one() -> None:
    assert rendezvous.MACHINES_S > rendezvous.ONE_MACHINE_S


def test_what_the_user_set_about_interfaces_stays() -> None:
    assert restrict_to_loopback({"GLOO_SOCKET_IFNAME": "eth0"}) == {"NCCL_SOCKET_IFNAME": "lo"}


def test_a_small_shared_memory_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    distributed.warn_about_shared_memory(tmp_path)
    assert not caplog.records
    monkeypatch.setattr(distributed, "NCCL_SHARED_MEMORY", 1 << 60)
    for folder in (tmp_path, tmp_path / "missing"):
        caplog.clear()
        distributed.warn_about_shared_memory(folder)
        assert "--shm-size" in caplog.text and os.fspath(folder) in caplog.text
