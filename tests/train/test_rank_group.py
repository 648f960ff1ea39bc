"""Where the ranks of a group meet, on one machine and on several."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from onellm_dist.launch.ranks import Ranks
from onellm_dist.train import rank_group
from onellm_dist.train.rendezvous import LOOPBACK

INTERFACE = "GLOO_SOCKET_IFNAME"
PORT = 29400


@pytest.mark.parametrize(
    ("hosts", "local_ranks", "together"),
    [
        (["localhost", "localhost", "localhost"], [0, 1, 2], True),
        # srun -m cyclic: each of the three has three ranks, as the group has.
        (["localhost", "other", "another"], [0, 0, 0], False),
    ],
)
def test_ranks_of_a_group_find_each_other_wherever_a_launcher_put_them(
    hosts: list[str],
    local_ranks: list[int],
    together: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = len(hosts)
    member = threading.local()
    met = threading.Barrier(size)

    @contextmanager
    def join_at_once(own: Ranks, _: Any) -> Iterator[Ranks]:
        """As `process_group`, as far as the ranks' meeting: the first one listens."""
        if own.rank:
            met.wait(30)
            yield own
            return
        with socket.create_server((LOOPBACK, own.port)):
            met.wait(30)
            yield own

    def join(rank: int) -> Ranks:
        member.rank = rank
        ranks = Ranks(rank, size, local_ranks[rank], size, "localhost", PORT)
        with rank_group.join_group(ranks, size, tmp_path) as own:
            return cast("Ranks", own)

    monkeypatch.setattr(socket, "gethostname", lambda: hosts[getattr(member, "rank", 0)])
    monkeypatch.setattr(rank_group, "process_group", join_at_once)
    monkeypatch.setattr(rank_group, "describe_start", lambda *_: "this start")
    monkeypatch.setenv(INTERFACE, "")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "")
    # An earlier start of the same name was killed here, as its ranks were on one machine.
    left = {"start": "this start", "call": "old"}
    (tmp_path / "group-0.json").write_text(
        json.dumps({**left, "address": LOOPBACK, "port": 1, "is_on_one_machine": True})
    )
    for other in range(1, size):
        answer = json.dumps({"call": "old", "host": "localhost"})
        (tmp_path / f"group-0-{other}.json").write_text(answer)
    with ThreadPoolExecutor(size) as pool:
        own = list(pool.map(join, range(size)))
    assert [ranks.rank for ranks in own] == list(range(size))
    assert {ranks.address for ranks in own} == {LOOPBACK if together else "localhost"}
    assert len({ranks.port for ranks in own}) == 1
    assert [ranks.are_on_one_machine for ranks in own] == [together] * size
    assert os.environ[INTERFACE] == ("lo" if together else "")
    assert not list(tmp_path.iterdir())
