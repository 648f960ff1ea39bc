"""A host made of Linux namespaces.

It has its own processes, mounts, host name, network and `/dev/shm`, and all of them are gone when
its first process is killed. Nothing of it is visible from outside, so there is nothing to unmount,
no device to delete and no file in `/dev/shm` to remove afterwards. The kernel ends the host when
the process that made it ends, in whatever way.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from onellm_dist.common.processes import PR_SET_PDEATHSIG

UNSHARE = (
    "unshare",
    "--mount",
    "--uts",
    "--net",
    "--pid",
    "--fork",
    "--kill-child=SIGKILL",
    "--mount-proc",
)
BOOT = """\
mount -t tmpfs tmpfs /dev/shm
mount --bind {hosts} /etc/hosts
hostname {name}
ip link set lo up
# Ranks of several such hosts cannot share a GPU (NCCL refuses), so the hosts have none.
for gpu in /dev/nvidia*; do [ ! -c "$gpu" ] || mount --bind /dev/null "$gpu"; done
"""
_LIBC = ctypes.CDLL(None, use_errno=True)  # loaded before a fork needs it


def _end_with_parent() -> None:
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Host:
    """A host on this machine.

    Args:
        name: host name.
        boot: bash script, run as the host's first process; it should end in `wait`.
        hosts: a file that replaces `/etc/hosts`.
        log: file for the output of the boot script.
        env: environment variables of the boot script.
    """

    def __init__(
        self, name: str, boot: str, *, hosts: Path, log: Path, env: Mapping[str, str]
    ) -> None:
        self.name = name
        script = BOOT.format(hosts=hosts, name=name) + boot
        with log.open("a", encoding="utf-8") as out:
            self._process = subprocess.Popen(
                [*UNSHARE, "bash", "-euc", script],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509 (no other thread has been started yet)
            )

    @property
    def is_alive(self) -> bool:
        """Whether the first process runs."""
        return self._process.poll() is None

    def find_pid(self, patience_s: float = 20.0) -> int:
        """Find the first process, as seen from outside; wait until the namespaces are made.

        Args:
            patience_s: longest wait.

        Raises:
            TimeoutError: the host did not start.
        """
        deadline = time.monotonic() + patience_s
        own = os.readlink("/proc/self/ns/pid")
        launcher = self._process.pid
        while time.monotonic() < deadline and self.is_alive:
            children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
            if children and os.readlink(f"/proc/{children[0]}/ns/pid") != own:
                return int(children[0])
            time.sleep(0.02)
        raise TimeoutError(f"host {self.name} did not start")

    def enter(self, command: Sequence[str], *, network_only: bool = False) -> list[str]:
        """Extend a command so that it runs on this host.

        Args:
            command: the command.
            network_only: only enter the host's network, and keep this machine's files.
        """
        spaces = ["--net"] if network_only else ["--net", "--mount", "--uts", "--pid"]
        return ["nsenter", f"--target={self.find_pid()}", *spaces, "--", *command]

    def kill(self) -> None:
        """End everything on the host at once."""
        if self.is_alive:
            self._process.kill()
        self._process.wait()


def list_pids(namespace: str) -> list[int]:
    """List the processes in a pid namespace (`pid:[4026...]`), as seen from outside."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "ns/pid") == namespace:
                found.append(int(entry.name))
        except OSError:  # it has ended meanwhile
            continue
    return found
