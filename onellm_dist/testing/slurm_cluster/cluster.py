"""A throw-away Slurm: own munge, controller and nodes, each node a host of its own (`namespaces.py`), all files in one folder.

Nothing outside that folder is read or written, no other Slurm is touched (`SLURM_CONF` is set for our own commands only), and nothing is
left when the process that made it ends, even by SIGKILL: then the folder alone stays, and the next cluster removes it.
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
    address,
    hosts_file,
    node_names,
    slurm_conf,
)
from onellm_dist.testing.slurm_cluster.folders import OWNER, claim_folder, remove_stale
from onellm_dist.testing.slurm_cluster.namespaces import Host, pids_of
from onellm_dist.testing.slurm_cluster.requirements import check_needs, find_tool
from onellm_dist.testing.slurm_cluster.ssh import boot_lines, write_ssh

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


class Cluster:
    """A Slurm of `nodes` nodes for the time of a `with` block.

    Args:
        nodes: hosts that run jobs, named n1, n2, ...
        grace_s: seconds between USR1 and TERM when a job is preempted.
        ssh: run sshd on every node, and let `ssh NODE` work from every other without questions.

    Raises:
        OneLLMError: this machine cannot run one (what is missing is said), or it did not come up.
    """

    def __init__(self, nodes: int = 2, *, grace_s: int = 30, ssh: bool = False) -> None:
        self.nodes = node_names(nodes)
        self._grace_s, self._ssh = grace_s, ssh
        self._hosts: dict[str, Host] = {}
        self._before: dict[int, Any] = {}
        self.root = Path("/nonexistent")
        """The folder of everything of this cluster, while it is up."""
        self.env: dict[str, str] = {}

    def __enter__(self) -> Cluster:
        check_needs(ssh=self._ssh)
        remove_stale()
        self.root = claim_folder()
        try:
            if threading.current_thread() is threading.main_thread():
                self._before = handle_termination(_interrupt)
            self._write_files()
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
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _write_files(self) -> None:
        for name in ("state", "tmp", *(f"spool-{node}" for node in self.nodes)):
            (self.root / name).mkdir()
        memory_mb = psutil.virtual_memory().total >> 20
        (self.root / "slurm.conf").write_text(
            slurm_conf(self.root, self.nodes, grace_s=self._grace_s, memory_mb=memory_mb)
        )
        (self.root / "gpus").mkdir()
        for i in range(FAKE_GPUS):
            (self.root / "gpus" / f"gpu{i}").touch()
        (self.root / "gres.conf").write_text(
            f"Name=gpu File={self.root}/gpus/gpu[0-{FAKE_GPUS - 1}]\n"
        )
        (self.root / "hosts").write_text(hosts_file(self.nodes))
        key = self.root / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        tools = str(Path(sys.executable).parent)
        path = os.pathsep.join(
            [
                tools,
                *(p for p in os.environ.get("PATH", "").split(os.pathsep) if p != tools),
                "/usr/sbin",
                "/sbin",
            ]
        )
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SLURM_", "SBATCH_", "SQUEUE_", "SALLOC_", "SCANCEL_"))
        }
        self.env = {
            **kept,
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "TMPDIR": str(self.root / "tmp"),
            "PATH": path,
        }
        if self._ssh:
            write_ssh(self.root, self.nodes)

    def _start_head(self) -> None:
        munged = f"{find_tool('munged')} --foreground --force --num-threads=2"
        files = " ".join(
            f"--{o}={self.root}/munge.{f}"
            for o, f in (
                ("key-file", "key"),
                ("socket", "socket"),
                ("pid-file", "pid"),
                ("log-file", "log"),
                ("seed-file", "seed"),
            )
        )
        boot = (
            f"ip link add switch type bridge\nip addr add {address(0)}/{PREFIX_LENGTH} dev switch\nip link set switch up\n"
            f"{munged} {files} &\nuntil [ -S {self.root}/munge.socket ]; do sleep 0.05; done\n"
            f"{find_tool('slurmctld')} -D &\nwait\n"
        )
        self._hosts[CONTROLLER] = Host(
            CONTROLLER, boot, hosts=self.root / "hosts", log=self.root / "head.log", env=self.env
        )
        self._wait_until(
            lambda: self.run("scontrol", "ping", check=False).stdout.count("UP") == 1,
            START_S,
            "slurmctld does not answer",
        )

    def start_node(self, name: str) -> None:
        """Bring a node up, at first or after `lose_node`."""
        place = self.nodes.index(name) + 1
        sshd = boot_lines(self.root, name) if self._ssh else ""
        boot = (
            "until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done\n"
            f"ip addr add {address(place)}/{PREFIX_LENGTH} dev eth0\nip link set eth0 up\n{sshd}"
            f"{find_tool('slurmd')} -D -N {name} &\nwait\n"
        )
        host = Host(
            name, boot, hosts=self.root / "hosts", log=self.root / f"{name}.log", env=self.env
        )
        self._hosts[name] = host
        plug = f"plug{place}-{host.pid()}"  # a lost node's plug may still be there for a moment
        add = [
            "ip",
            "link",
            "add",
            plug,
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            str(host.pid()),
        ]
        head = self._hosts[CONTROLLER]
        for command in (add, ["ip", "link", "set", plug, "master", "switch", "up"]):
            subprocess.run(head.enter(command, network_only=True), check=True, timeout=COMMAND_S)

    def wait_for_nodes(self, names: Sequence[str]) -> None:
        """Until these nodes are idle.

        Raises:
            OneLLMError: they do not become so.
        """
        self._wait_until(
            lambda: all(self.node_states().get(name) == "idle" for name in names),
            START_S,
            "the nodes are not idle",
        )

    def wait_for_messages(self) -> None:
        """Until the controller has no message under way, for `MESSAGES_S` at most.

        What it could not tell a lost node it tells it again a minute later (Slurm 22.05): a step that has the old one's number by then, for
        its job was requeued, is ended by it.
        """
        deadline = time.monotonic() + MESSAGES_S
        while self._messages() and time.monotonic() < deadline:
            time.sleep(0.5)

    def _messages(self) -> int:
        text = self.run("sdiag", check=False).stdout
        return sum(
            int(count)
            for count in re.findall(r"^Agent (?:queue size|count): *(\d+)", text, re.MULTILINE)
        )

    def is_up(self, name: str) -> bool:
        """Whether a node runs."""
        return name in self._hosts and self._hosts[name].alive

    def lose_node(self, name: str) -> None:
        """End a node as a power cut does: every process on it, at once."""
        self._hosts.pop(name).kill()

    def on_node(self, name: str, command: Sequence[str]) -> list[str]:
        """`command` so that it runs on a node (with `self.env`)."""
        return self._hosts[name].enter(command)

    def run(
        self,
        *command: str,
        check: bool = True,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """A command of Slurm (`squeue`, `sbatch`, ...) against this cluster.

        Raises:
            OneLLMError: it failed, and `check` is set.
        """
        entered = self.enter_command(command)
        here = {**self.env, **(env or {})}
        done = subprocess.run(
            entered,
            env=here,
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

    def enter_command(self, command: Sequence[str]) -> list[str]:
        """`command` so that it reaches the controller (with `self.env`); it sees this machine's files."""
        return self._hosts[CONTROLLER].enter(command, network_only=True)

    def submit(
        self,
        script: Path,
        *options: str,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> int:
        """`sbatch`; returns the job's number."""
        done = self.run("sbatch", "--parsable", *options, str(script), cwd=cwd, env=env)
        return int(done.stdout.strip().split(";")[0])

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says of it (`JOB_FIELDS`)."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(number)).stdout
        found = dict(item.split("=", 1) for item in text.split() if "=" in item)
        return {key: found.get(key, "") for key in JOB_FIELDS}

    def node_states(self) -> dict[str, str]:
        """Node -> idle, mixed, allocated, down, ..."""
        text = self.run(
            "sinfo", "--noheader", "--Node", "--partition=normal", "--format=%N %T", check=False
        ).stdout
        return {name: state for name, state in (line.split() for line in text.splitlines())}

    def pids(self, node: str) -> list[int]:
        """Processes of a node, as seen from outside."""
        return pids_of(os.readlink(f"/proc/{self._hosts[node].pid()}/ns/pid"))

    def _wait_until(self, true: Callable[[], bool], patience_s: float, otherwise: str) -> None:
        deadline = time.monotonic() + patience_s
        while not true():
            dead = [name for name, host in self._hosts.items() if not host.alive]
            if dead or time.monotonic() > deadline:
                logs = "\n".join(_tail(path) for path in sorted(self.root.glob("*.log")))
                raise OneLLMError(
                    f"the throw-away Slurm did not come up: {otherwise}{' (ended: ' + ', '.join(dead) + ')' if dead else ''}",
                    logs,
                    "`onellm doctor` says what this machine has.",
                )
            time.sleep(0.1)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    """TERM and HUP unwind like Ctrl-C does, so that the `with` block cleans up."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def _tail(path: Path, lines: int = 5) -> str:
    return "\n".join(
        f"{path.name}: {line}"
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    )
