"""A throw-away Slurm with its own munge, controller and nodes.

Each node is a host of its own (`namespaces.py`), and all files are in one folder. Nothing outside
that folder is read or written, and no other Slurm is touched: `SLURM_CONF` is set for our own
commands only. Nothing is left when the process that made it ends. After a SIGKILL, only the folder
remains, and the next cluster removes it.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from onellm_dist.common.errors import OneLLMError
from onellm_dist.launch.local import handle_termination
from onellm_dist.testing.slurm_cluster.config import (
    CONTROLLER,
    FAKE_GPUS,
    PREFIX_LENGTH,
    format_hosts,
    format_slurm_conf,
    get_address,
    make_node_names,
)
from onellm_dist.testing.slurm_cluster.folders import OWNER, make_folder, remove_stale_folders
from onellm_dist.testing.slurm_cluster.namespaces import Host, list_pids
from onellm_dist.testing.slurm_cluster.requirements import check_requirements, find_tool
from onellm_dist.testing.slurm_cluster.ssh import format_boot_lines, write_ssh_files

START_S = 90.0
COMMAND_S = 60.0
MESSAGES_S = 90.0
JOB_FIELDS = (
    "JobState",
    "Reason",
    "Restarts",
    "NodeList",
    "BatchHost",
    "ExitCode",
    "StartTime",
    "NumNodes",
)
FINISHED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
}
"""States of a job that has ended for good."""
MUNGE_FILES = ("key", "socket", "pid", "log", "seed")
BOOT_HEAD = """\
ip link add switch type bridge
ip addr add {address}/{prefix} dev switch
ip link set switch up
{munged} &
until [ -S {root}/munge.socket ]; do sleep 0.05; done
{slurmctld} -D &
wait
"""
BOOT_NODE = """\
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add {address}/{prefix} dev eth0
ip link set eth0 up
{sshd}{slurmd} -D -N {name} &
wait
"""


class Cluster:
    """A Slurm of several nodes for the time of a `with` block.

    Args:
        nodes: number of hosts that run jobs; they are named n1, n2, ...
        grace_s: seconds between USR1 and TERM when a job is preempted.
        ssh: whether every node runs sshd, so that `ssh NODE` works from every other one.

    Raises:
        OneLLMError: no Slurm can run on this machine (the error says why), or it did not start.
    """

    def __init__(self, nodes: int = 2, *, grace_s: int = 30, ssh: bool = False) -> None:
        self.nodes = make_node_names(nodes)
        self.root = Path("/nonexistent")
        """The folder of all files of the cluster, while it is up."""
        self.env: dict[str, str] = {}
        """Environment variables of the cluster's commands and jobs."""
        self._grace_s = grace_s
        self._ssh = ssh
        self._hosts: dict[str, Host] = {}
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Cluster:
        check_requirements(ssh=self._ssh)
        remove_stale_folders()
        self.root = make_folder()
        try:
            if threading.current_thread() is threading.main_thread():
                self._handlers = handle_termination(_interrupt)
            self._write_files()
            self.env = self._make_environment()
            self._start_head()
            for name in self.nodes:
                self.start_node(name)
            self.wait_for_nodes(self.nodes)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process of the cluster and remove its folder."""
        for host in self._hosts.values():
            host.kill()
        self._hosts.clear()
        if (self.root / OWNER).is_file():
            shutil.rmtree(self.root, ignore_errors=True)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def _write_files(self) -> None:
        for name in ("state", "tmp", "gpus", *(f"spool-{node}" for node in self.nodes)):
            (self.root / name).mkdir()
        for i in range(FAKE_GPUS):
            (self.root / "gpus" / f"gpu{i}").touch()
        memory_mb = psutil.virtual_memory().total >> 20
        conf = format_slurm_conf(self.root, self.nodes, grace_s=self._grace_s, memory_mb=memory_mb)
        gpus = f"Name=gpu File={self.root}/gpus/gpu[0-{FAKE_GPUS - 1}]\n"
        (self.root / "slurm.conf").write_text(conf)
        (self.root / "gres.conf").write_text(gpus)
        (self.root / "hosts").write_text(format_hosts(self.nodes))
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        if self._ssh:
            write_ssh_files(self.root, self.nodes)

    def _make_environment(self) -> dict[str, str]:
        """This process's environment without the settings of another Slurm."""
        tools = str(Path(sys.executable).parent)
        folders = os.environ.get("PATH", "").split(os.pathsep)
        path = [tools, *(folder for folder in folders if folder != tools), "/usr/sbin", "/sbin"]
        others = ("SLURM_", "SBATCH_", "SQUEUE_", "SALLOC_", "SCANCEL_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(others)}
        return {
            **kept,
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "TMPDIR": str(self.root / "tmp"),
            "PATH": os.pathsep.join(path),
        }

    def _start_head(self) -> None:
        munged = f"{find_tool('munged')} --foreground --force --num-threads=2"
        for name in MUNGE_FILES:
            option = name if name == "socket" else f"{name}-file"
            munged += f" --{option}={self.root}/munge.{name}"
        boot = BOOT_HEAD.format(
            address=get_address(0),
            prefix=PREFIX_LENGTH,
            munged=munged,
            root=self.root,
            slurmctld=find_tool("slurmctld"),
        )
        self._hosts[CONTROLLER] = self._make_host(CONTROLLER, boot)
        self._wait_until(
            lambda: self.run("scontrol", "ping", check=False).stdout.count("UP") == 1,
            START_S,
            "slurmctld does not answer",
        )

    def start_node(self, name: str) -> None:
        """Start a node, for the first time or after `lose_node`."""
        index = self.nodes.index(name) + 1
        boot = BOOT_NODE.format(
            address=get_address(index),
            prefix=PREFIX_LENGTH,
            sshd=format_boot_lines(self.root, name) if self._ssh else "",
            slurmd=find_tool("slurmd"),
            name=name,
        )
        host = self._make_host(name, boot)
        self._hosts[name] = host
        pid = host.find_pid()
        plug = f"plug{index}-{pid}"  # the plug of a lost node may still be there for a moment
        peer = f"peer name eth0 netns {pid}"
        head = self._hosts[CONTROLLER]
        for command in (
            f"ip link add {plug} type veth {peer}",
            f"ip link set {plug} master switch up",
        ):
            entered = head.enter(command.split(), network_only=True)
            subprocess.run(entered, check=True, timeout=COMMAND_S)

    def _make_host(self, name: str, boot: str) -> Host:
        log = self.root / f"{name}.log"
        return Host(name, boot, hosts=self.root / "hosts", log=log, env=self.env)

    def wait_for_nodes(self, names: Sequence[str]) -> None:
        """Wait until these nodes are idle.

        Raises:
            OneLLMError: they do not become idle in time.
        """
        self._wait_until(
            lambda: all(self.get_node_states().get(name) == "idle" for name in names),
            START_S,
            "the nodes are not idle",
        )

    def wait_for_messages(self) -> None:
        """Wait until the controller has no pending message, for `MESSAGES_S` at most.

        A message that did not reach a lost node is sent again a minute later (Slurm 22.05). It then
        ends whatever step has the number of the old one, for instance that of the requeued job.
        """
        deadline = time.monotonic() + MESSAGES_S
        while self._count_messages() and time.monotonic() < deadline:
            time.sleep(0.5)

    def _count_messages(self) -> int:
        text = self.run("sdiag", check=False).stdout
        counts = re.findall(r"^Agent (?:queue size|count): *(\d+)", text, re.MULTILINE)
        return sum(map(int, counts))

    def is_up(self, name: str) -> bool:
        """Whether a node runs."""
        return name in self._hosts and self._hosts[name].is_alive

    def lose_node(self, name: str) -> None:
        """End a node as a power cut does: every process on it, at once."""
        self._hosts.pop(name).kill()

    def enter_node(self, name: str, command: Sequence[str]) -> list[str]:
        """Extend a command so that it runs on a node (use it with `self.env`)."""
        return self._hosts[name].enter(command)

    def enter_head(self, command: Sequence[str]) -> list[str]:
        """Extend a command so that it reaches the controller, and still sees this machine's files.

        Use it with `self.env`.
        """
        return self._hosts[CONTROLLER].enter(command, network_only=True)

    def run(
        self,
        *command: str,
        check: bool = True,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of Slurm (`squeue`, `sbatch`, ...) against this cluster.

        Args:
            command: the command.
            check: whether a failure raises an error.
            cwd: its working directory.
            env: environment variables besides the cluster's.

        Raises:
            OneLLMError: it failed, and `check` is set.
        """
        done = subprocess.run(
            self.enter_head(command),
            env={**self.env, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        if check and done.returncode:
            raise OneLLMError(
                f"{' '.join(command)}: {done.stderr.strip() or done.returncode}",
                "the throw-away Slurm refused it.",
                f"see {self.root}.",
            )
        return done

    def submit(
        self,
        script: Path,
        *options: str,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> int:
        """Submit a job script by `sbatch`.

        Args:
            script: the script.
            options: further options of sbatch.
            cwd: working directory of the job.
            env: environment variables besides the cluster's.

        Returns:
            The id of the job.
        """
        done = self.run("sbatch", "--parsable", *options, str(script), cwd=cwd, env=env)
        return int(done.stdout.strip().split(";")[0])

    def show_job(self, number: int) -> dict[str, str]:
        """Get the `JOB_FIELDS` of a job from `scontrol show job`."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(number)).stdout
        found = dict(item.split("=", 1) for item in text.split() if "=" in item)
        return {key: found.get(key, "") for key in JOB_FIELDS}

    def get_node_states(self) -> dict[str, str]:
        """Get the state of every node: idle, mixed, allocated, down, ..."""
        options = ("--noheader", "--Node", "--partition=normal", "--format=%N %T")
        text = self.run("sinfo", *options, check=False).stdout
        states: dict[str, str] = {}
        for line in text.splitlines():
            name, state = line.split()
            states[name] = state
        return states

    def list_pids(self, node: str) -> list[int]:
        """List the processes of a node, as seen from outside."""
        return list_pids(os.readlink(f"/proc/{self._hosts[node].find_pid()}/ns/pid"))

    def _wait_until(self, condition: Callable[[], bool], patience_s: float, otherwise: str) -> None:
        deadline = time.monotonic() + patience_s
        while not condition():
            dead = [name for name, host in self._hosts.items() if not host.is_alive]
            if dead or time.monotonic() > deadline:
                ended = f" (ended: {', '.join(dead)})" if dead else ""
                raise OneLLMError(
                    f"the throw-away Slurm did not start: {otherwise}{ended}",
                    "\n".join(_read_tail(path) for path in sorted(self.root.glob("*.log"))),
                    "`onellm doctor` shows what this machine has.",
                )
            time.sleep(0.1)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    """Unwind on TERM and HUP as on Ctrl-C, so that the `with` block cleans up."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def _read_tail(path: Path, lines: int = 5) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    return "\n".join(f"{path.name}: {line}" for line in text.splitlines()[-lines:])
