"""A host made of Linux namespaces: own processes, mounts, host name, network and `/dev/shm`, all gone when its first process is killed.

Nothing of it is seen from outside, so there is nothing to unmount, no device to delete and no file in `/dev/shm` to remove afterwards;
the kernel ends it when the process that made it ends, however that ended.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

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
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Host:
    """A host on this machine. `boot` is a bash script, run as its first process; it should end in `wait`.

    Args:
        name: host name.
        hosts: a file that stands as `/etc/hosts` there.
        log: where the boot script's output goes.
    """

    def __init__(
        self, name: str, boot: str, *, hosts: Path, log: Path, env: Mapping[str, str]
    ) -> None:
        self.name = name
        # Ranks of several such hosts cannot share a GPU (NCCL refuses), so the hosts have none.
        first = (
            f"mount -t tmpfs tmpfs /dev/shm\nmount --bind {hosts} /etc/hosts\nhostname {name}\nip link set lo up\n"
            'for gpu in /dev/nvidia*; do [ ! -c "$gpu" ] || mount --bind /dev/null "$gpu"; done\n'
        )
        with log.open("a", encoding="utf-8") as out:
            self._process = subprocess.Popen(
                [*UNSHARE, "bash", "-euc", first + boot],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=dict(env),
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - the main thread, before any other is started
            )

    @property
    def alive(self) -> bool:
        """Whether its first process runs."""
        return self._process.poll() is None

    def pid(self, patience_s: float = 20.0) -> int:
        """Its first process, as seen from outside. Waits until the namespaces are made."""
        deadline = time.monotonic() + patience_s
        own = os.readlink("/proc/self/ns/pid")
        while time.monotonic() < deadline and self.alive:
            children = (
                Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
                .read_text(encoding="utf-8")
                .split()
            )
            if children and os.readlink(f"/proc/{children[0]}/ns/pid") != own:
                return int(children[0])
            time.sleep(0.02)
        raise TimeoutError(f"host {self.name} did not start")

    def enter(self, command: Sequence[str], *, network_only: bool = False) -> list[str]:
        """`command` so that it runs on this host; with `network_only`, here but in its network."""
        what = ["--net"] if network_only else ["--net", "--mount", "--uts", "--pid"]
        return ["nsenter", f"--target={self.pid()}", *what, "--", *command]

    def kill(self) -> None:
        """End everything on it at once."""
        if self.alive:
            self._process.kill()
        self._process.wait()


def pids_of(namespace: str) -> list[int]:
    """Processes in a pid namespace (`pid:[4026...]`), as seen from outside."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "ns/pid") == namespace:
                found.append(int(entry.name))
        except OSError:  # it ended meanwhile
            continue
    return found
