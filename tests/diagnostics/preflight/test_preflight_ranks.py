"""`onellm doctor --distributed` over gloo ranks that simulate faulty nodes: each fault is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from forked_python import get_programs

from onellm_dist.diagnostics.preflight.options import PRETEND
from onellm_dist.launch.local import find_free_port

RECIPE = "toy/align_image"


class PreflightRun:
    """Ranks started as by a launcher, each on a simulated node; those in `absent` never join."""

    def __init__(
        self,
        tmp: Path,
        simulated: list[dict[str, Any]],
        *,
        absent: tuple[int, ...] = (),
        **options: Any,
    ) -> None:
        self.run_dir = tmp / "run"
        self.exclude_file = tmp / "bad_nodes"
        data = tmp / "data"
        (data / "image").mkdir(parents=True)
        (data / "image" / "00000.tar").write_bytes(os.urandom(1 << 20))
        given = {
            "recipe": RECIPE,
            "overrides": [f"run.dir={self.run_dir}", f"data.root={data}"],
            "exclude_file": str(self.exclude_file),
            "as_json": True,
            "wait": 60,
            "limit": 20,
            "megabytes": 4,
            **options,
        }
        world_size = len(simulated)
        port = str(find_free_port())
        names = [str(p["node"]) for p in simulated]
        python = str(get_programs() / "python")
        self.started = time.monotonic()
        self.ranks = {
            rank: subprocess.Popen(
                [python, "-m", "onellm_dist.diagnostics.preflight", json.dumps(given)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_RANK": "0",
                    "LOCAL_WORLD_SIZE": "1",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "SLURM_STEP_NODELIST": ",".join(names),
                    "SLURM_STEP_TASKS_PER_NODE": f"1(x{world_size})",
                    PRETEND: json.dumps(faults),
                },
            )
            for rank, faults in enumerate(simulated)
            if rank not in absent
        }
        self.output = {
            rank: process.communicate(timeout=120) for rank, process in self.ranks.items()
        }
        self.seconds = time.monotonic() - self.started
        self.codes = {rank: process.returncode for rank, process in self.ranks.items()}

    @property
    def result(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.output[0][0])
        return found

    def faults(self, node: str) -> str:
        return " | ".join(
            f["what"] for f in self.result["faults"] if f["node"] == node and f["state"] == "fail"
        )


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> PreflightRun:
    """Five nodes: healthy, slow link, wrong clock, another torch and a full disk, never joins."""
    return PreflightRun(
        tmp_path_factory.mktemp("sick"),
        [
            {"node": "n1"},
            {"node": "n2", "link_delay": 0.25},
            {"node": "n3", "clock": 40.0},
            {"node": "n4", "torch": "2.11.0", "free_bytes": 1000},
            {"node": "n5"},
        ],
        absent=(4,),
        wait=12,
    )


@pytest.mark.slow
def test_every_sick_node_is_named_with_its_own_fault(sick: PreflightRun) -> None:
    assert "all-reduce at" in sick.faults("n2") and "median" in sick.faults("n2")
    clock = re.search(r"its clock is ([0-9.]+) s ahead", sick.faults("n3"))
    assert clock is not None and abs(float(clock[1]) - 40) < 5
    assert "torch is 2.11.0" in sick.faults("n4") and "run.dir cannot be written" in sick.faults(
        "n4"
    )
    assert "rank 4 never joined" in sick.faults("n5")
    assert sick.faults("n1") == "", sick.output[0]


@pytest.mark.slow
def test_each_fault_is_reported_for_its_node_alone(sick: PreflightRun) -> None:
    assert "clock" not in sick.faults("n2") + sick.faults("n4") and "all-reduce" not in sick.faults(
        "n3"
    ) + sick.faults("n4")
    assert "torch" not in sick.faults("n2") + sick.faults("n3")


@pytest.mark.slow
def test_the_bad_nodes_go_to_the_exclude_file_and_every_rank_has_the_exit_code(
    sick: PreflightRun,
) -> None:
    assert sick.exclude_file.read_text() == "n2,n3,n4,n5\n"
    assert set(sick.codes.values()) == {1}
    assert json.loads((sick.run_dir / "preflight.json").read_text())["exclude"] == [
        "n2",
        "n3",
        "n4",
        "n5",
    ]
    assert all(rank == 0 or not out for rank, (out, _) in sick.output.items()), "only rank 0 prints"


@pytest.mark.slow
def test_healthy_nodes_pass_and_leave_no_files(tmp_path: Path) -> None:
    healthy = PreflightRun(tmp_path, [{"node": "a"}, {"node": "b"}, {"node": "c"}])
    assert set(healthy.codes.values()) == {0}, healthy.result["faults"]
    found = healthy.result
    assert (
        found["ok"]
        and not [f for f in found["faults"] if f["state"] == "fail"]
        and found["exclude"] == []
    )
    assert healthy.exclude_file.read_text() == ""
    for node in ("a", "b", "c"):
        facts = found["nodes"][node]
        assert (
            abs(facts["clock_ahead_s"]) < 1
            and facts["link_bytes_per_s"] > 0
            and len(facts["pairs"]) == 2
        )
        assert (
            facts["disk"]["write"] > 0
            and facts["disk"]["read"] > 0
            and facts["data"]["missing"] == []
        )
    assert found["needs"]["checkpoint"] > 0
    assert [p.name for p in healthy.run_dir.iterdir()] == ["preflight.json"], (
        "its files are removed"
    )


@pytest.mark.slow
def test_a_rank_that_is_stuck_and_one_that_dies_are_named_in_time(tmp_path: Path) -> None:
    start = PreflightRun(
        tmp_path,
        [{"node": "a"}, {"node": "b", "stuck_in": "host"}, {"node": "c", "gone_in": "disk"}],
        limit=3,
    )
    assert "rank 1: host: not done within 3 s" in start.faults("b")
    assert "rank 2 stopped answering in phase own checks" in start.faults("c")
    assert start.faults("a") == "" and start.exclude_file.read_text() == "b,c\n"
    assert (start.codes[0], start.codes[1]) == (1, 1) and start.seconds < 60


@pytest.mark.slow
def test_a_link_that_hangs_is_attributed_to_its_node_and_not_to_partners(tmp_path: Path) -> None:
    """Every partner hangs with it, and works with the next one."""
    start = PreflightRun(
        tmp_path,
        [{"node": "a"}, {"node": "b"}, {"node": "c", "link_stuck": True}, {"node": "d"}],
        limit=5,
    )
    assert start.exclude_file.read_text() == "c\n", start.output
    assert (
        "no all-reduce with any of its partners" in start.faults("c")
        and start.faults("a") + start.faults("b") + start.faults("d") == ""
    )
    assert set(start.codes.values()) == {1} and "stopped answering" not in start.faults("c")
    assert all(
        node["link_bytes_per_s"] for name, node in start.result["nodes"].items() if name != "c"
    )


@pytest.mark.slow
def test_without_rank_0_the_others_report_it_and_end(tmp_path: Path) -> None:
    start = PreflightRun(tmp_path, [{"node": "a"}, {"node": "b"}], absent=(0,), wait=3)
    assert start.codes == {1: 1} and start.seconds < 40
    assert "rank 0 does not answer" in start.output[1][1] and "--exclude=a" in start.output[1][1]
    assert start.exclude_file.read_text() == "a\n"


@pytest.mark.slow
def test_without_a_launcher_local_ranks_are_started(tmp_path: Path) -> None:
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE"))
    }
    command = [
        str(get_programs() / "onellm"),
        "doctor",
        "--distributed",
        "--ranks",
        "2",
        "--limit",
        "20",
        "--recipe",
        RECIPE,
    ]
    done = subprocess.run(
        [*command, f"run.dir={tmp_path / 'run'}", f"data.root={tmp_path / 'nowhere'}"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
        env=env,
    )
    assert done.returncode == 1
    assert (
        "nowhere/image" in done.stdout and "FAIL" in done.stdout and "do not start" in done.stdout
    )
    assert "failed first" not in done.stderr, "a fault is not a crash"
