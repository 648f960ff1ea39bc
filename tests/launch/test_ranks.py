"""Ranks as launchers describe them."""

from __future__ import annotations

import contextlib
import os
import pty
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onellm_dist.common.errors import UsageError
from onellm_dist.launch.local import exit_by_signal, handle_termination
from onellm_dist.launch.ranks import Ranks, check_launch_ranks, discover_ranks
from onellm_dist.launch.slurm.environment import compute_port, expand_hosts, parse_tasks_per_node
from onellm_dist.launch.slurm.job import SlurmJob
from onellm_dist.launch.slurm.script import render

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_JOB_ID": "31234",
    "SLURM_STEP_NODELIST": "gpu[08-10]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}


def test_no_launcher() -> None:
    assert discover_ranks({}) is None


def test_ranks_of_deepspeed_and_torchrun() -> None:
    env = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "7",
    }
    assert discover_ranks(env) == Ranks(3, 4, 1, 2, "a", 7)
    assert discover_ranks({**env, "LOCAL_WORLD_SIZE": "4"}) == Ranks(3, 4, 1, 4, "a", 7)


@pytest.mark.parametrize(
    "env", [{"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "x", "WORLD_SIZE": "2"}]
)
def test_contradicting_ranks_are_refused(env: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        discover_ranks(env)


TORCH = {"RANK": "3", "WORLD_SIZE": "6"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({**STEP, "RANK": "5", "WORLD_SIZE": "6", "MASTER_ADDR": "gpu08"}, (5, 6, 1, 2, "gpu08")),
        ({**STEP, "WORLD_SIZE": "6"}, (5, 6, 1, 2, "gpu08")),
        ({**STEP, "PMI_RANK": "5", "PMI_SIZE": "6"}, (5, 6, 1, 2, "gpu08")),
        (TORCH, (3, 6, 3, 6, "127.0.0.1")),
        ({**TORCH, "PET_NNODES": "6", "MASTER_ADDR": "job-master-0"}, (3, 6, 0, 1, "job-master-0")),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"}, (0, 1, 0, 1, "x")),
        ({**OPEN_MPI, "MASTER_ADDR": "a"}, (3, 4, 1, 2, "a")),
        ({**STEP, **OPEN_MPI, "MASTER_ADDR": "a"}, (3, 4, 1, 2, "a")),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}, (0, 1, 0, 1, "127.0.0.1")),
        (HYDRA, (3, 4, 3, 4, "127.0.0.1")),
        ({**STEP, **HYDRA, "SLURM_PROCID": "3"}, (3, 4, 3, 4, "127.0.0.1")),
    ],
    ids=[
        "RANK under srun",
        "WORLD_SIZE under srun",
        "srun --mpi=pmi2",
        "one machine",
        "PyTorchJob",
        "alone",
        "mpirun",
        "mpirun in a job",
        "mpirun -n 1",
        "mpiexec",
        "mpiexec in a job",
    ],
)
def test_incomplete_variables_are_understood(
    env: dict[str, str], place: tuple[int, int, int, int, str]
) -> None:
    ranks = discover_ranks(env)
    assert ranks is not None
    assert (
        ranks.rank,
        ranks.world_size,
        ranks.local_rank,
        ranks.local_world_size,
        ranks.address,
    ) == place


@pytest.mark.parametrize("local_rank", ["0", "1"])
def test_without_a_local_size_only_a_loopback_address_means_one_machine(local_rank: str) -> None:
    """A script that exports RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR; a pod with one GPU."""
    env = {**TORCH, "LOCAL_RANK": local_rank}
    for address in ("node-1", "10.0.0.7", socket.gethostname()):
        ranks = discover_ranks({**env, "MASTER_ADDR": address})
        assert ranks is not None and ranks.address == address
        assert not ranks.are_on_one_machine and not ranks.local_size_is_known
        # The least that it can be: no GPU is asked for that the machine need not have.
        assert (ranks.local_rank, ranks.local_world_size) == (int(local_rank), int(local_rank) + 1)
    for here in ({}, {"MASTER_ADDR": "localhost"}, {"MASTER_ADDR": "127.0.0.1"}):
        ranks = discover_ranks({**env, **here})
        assert ranks is not None and ranks.are_on_one_machine and ranks.local_world_size == 6


def test_the_last_rank_does_not_take_several_machines_for_one() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node-1"}
    ranks = discover_ranks(env)
    assert ranks is not None and not ranks.are_on_one_machine, "as rank 0 sees it"
    alone = discover_ranks({**env, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert alone is not None and alone.are_on_one_machine


def test_slurm_says_the_local_size_of_its_own_ranks_alone() -> None:
    env = {**STEP, "RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu08"}
    assert discover_ranks(env) == Ranks(5, 6, 1, 2, "gpu08", 29500)
    assert discover_ranks({**env, "LOCAL_RANK": "0"}) == Ranks(5, 6, 0, 2, "gpu08", 29500)
    other = discover_ranks({**env, "RANK": "3", "WORLD_SIZE": "8"})
    assert other is not None and not other.local_size_is_known


def test_the_ranks_of_an_mpi_start_meet_at_one_port_and_two_starts_at_two() -> None:
    ports = {
        discover_ranks({**HYDRA, "PMI_RANK": rank, "MPI_LOCALRANKID": rank, "PMI_JOBID": job}).port  # type: ignore[union-attr]
        for job in ("kvs_1_0", "kvs_2_0")
        for rank in "0123"
    }
    assert len(ports) == 2 and all(12000 <= port < 32768 for port in ports)


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"RANK": "0"}, "RANK=0"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0"),
        ({"NODE_RANK": "1", "MASTER_ADDR": "a"}, "NODE_RANK=1"),
        ({**TORCH, "MASTER_ADDR": "node-1"}, "LOCAL_RANK"),
        ({**TORCH, "LOCAL_RANK": "6"}, "LOCAL_RANK"),
        ({**TORCH, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK"),
        ({**TORCH, "LOCAL_RANK": "6", "MASTER_ADDR": "node-1"}, "LOCAL_RANK"),
        ({**TORCH, "LOCAL_RANK": "one"}, "LOCAL_RANK=one"),
        ({**TORCH, "MASTER_PORT": "http"}, "MASTER_PORT=http"),
        ({**TORCH, "MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({**TORCH, "PET_NNODES": "3", "PET_NPROC_PER_NODE": "2"}, "PET_NPROC_PER_NODE=2"),
        ({"PET_NNODES": "2:4"}, "PET_NNODES=2:4"),
        ({**STEP, "RANK": "2"}, "RANK=2"),
        ({**STEP, "WORLD_SIZE": "8"}, "WORLD_SIZE=8"),
        ({**STEP, "SLURM_NTASKS": "six"}, "SLURM_NTASKS=six"),
        ({**STEP, "SLURM_NODEID": "3"}, "SLURM_NODEID=3"),
        (OPEN_MPI, "MASTER_ADDR"),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, "MPI_LOCALRANKID"),
        ({"OMPI_COMM_WORLD_RANK": "", "OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK"),
    ],
)
def test_stray_and_contradicting_variables_are_refused_by_name(
    env: dict[str, str], name: str
) -> None:
    with pytest.raises(UsageError) as info:
        discover_ranks(env)
    assert name in info.value.what and info.value.why and info.value.do


def test_launch_ranks_beside_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    stray = discover_ranks({"RANK": "0", "WORLD_SIZE": "1"})
    slurm = discover_ranks(STEP)
    assert stray is not None and slurm is not None
    refused = ((2, stray, True), (2, stray, False), (3, slurm, True))
    for wanted, ranks, typed in refused:
        with pytest.raises(UsageError, match=f"launch.ranks={wanted}, but .*RANK|SLURM_PROCID"):
            check_launch_ranks(wanted, ranks, typed=typed)
    check_launch_ranks(None, stray, typed=True)
    for wanted, ranks in ((1, stray), (1, slurm), (6, slurm)):
        check_launch_ranks(wanted, ranks, typed=True)
    check_launch_ranks(2, slurm, typed=False)  # a recipe's own, for starts without a launcher
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_launch_ranks(2, stray, typed=False)


def test_the_shell_of_srun_pty_is_no_rank() -> None:
    """Typed into it, a command starts local ranks; run by srun itself, it is a rank."""
    code = (
        "import sys; from onellm_dist.launch.ranks import discover_ranks\n"
        "r = discover_ranks(); print('rank', r and r.rank)"
    )
    env = {**os.environ, **STEP, "SLURM_PTY_PORT": "4242"}
    for shell, answer in ((True, b"rank None"), (False, b"rank 5")):
        command = [sys.executable, "-c", code]
        if shell:
            command = ["bash", "-c", f"{shlex.join(command)}; true"]
        assert answer in run_in_terminal(command, env)


def run_in_terminal(command: list[str], env: dict[str, str]) -> bytes:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    found = b""
    with contextlib.suppress(OSError), os.fdopen(ours, "rb", 0) as terminal:
        while data := terminal.read(4096):
            found += data
    process.wait(60)
    return found


def test_ranks_of_a_slurm_step() -> None:
    assert discover_ranks(STEP) == Ranks(5, 6, 1, 2, "gpu08", 12000 + 31234 % 20000)


def test_two_starts_of_a_job_meet_at_different_ports_below_the_ephemeral_ones() -> None:
    ports = [compute_port(31234, restart) for restart in range(50)]
    assert len(set(ports)) == 50 and all(12000 <= port < 32768 for port in ports)
    ranks = discover_ranks({**STEP, "SLURM_RESTART_COUNT": "3"})
    assert ranks is not None and ranks.port == ports[3]
    # The job script computes the same port in bash.
    script = render(SlurmJob("x", Path("r"), (2, 2), 8, 8, starter="torchrun"))
    line = next(x for x in script.splitlines() if x.startswith("port="))
    done = subprocess.run(
        ["bash", "-c", f"{line}; echo $port"],
        env={"SLURM_JOB_ID": "31234", "SLURM_RESTART_COUNT": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == ports[3]


def test_term_and_a_closed_terminal_are_handled_unless_nohup_ignores_them() -> None:
    first = {
        number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        before = handle_termination(exit_by_signal)
        assert set(before) == set(first)
        with pytest.raises(SystemExit) as ended:
            hang_up()
        assert ended.value.code == 128 + signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert set(handle_termination(exit_by_signal)) == {signal.SIGTERM}
        os.kill(os.getpid(), signal.SIGHUP)
    finally:
        for number, handler in first.items():
            signal.signal(number, handler)


def hang_up() -> None:
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(1)  # the handler runs between two instructions of Python


def test_a_batch_script_is_not_a_rank() -> None:
    assert discover_ranks({k: v for k, v in STEP.items() if k != "SLURM_STEP_ID"}) is None


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("n[1-3,7]", ["n1", "n2", "n3", "n7"]),
        ("x[09-10]-ib,b", ["x09-ib", "x10-ib", "b"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_host_lists(text: str, hosts: list[str]) -> None:
    assert expand_hosts(text) == hosts


def test_tasks_per_node() -> None:
    assert parse_tasks_per_node("2(x3),1") == [2, 2, 2, 1]
