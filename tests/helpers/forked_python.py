"""Programs that start at once: `python`, `onellm`, `deepspeed` and `torchrun` without the imports.

Run as a program, it imports torch, transformers, DeepSpeed and the package once, then forks a
process for each program that somebody starts. `get_programs` gives the folder of the programs: put
it first on a PATH, or start its `python`. A program has the arguments, folder, environment, output,
signals and exit code that it would have by itself, and costs 0.1 s of CPU instead of 5. One serves
all test processes of a run: `open_folder` (called by conftest.py) says where, and the first that
needs a program starts it. What it
cannot show is whether a program imports all that it needs, and what it does about `python -u` or
variables that libraries read at import: `make soak` sets ONELLM_REAL_PROGRAMS, with which the real
ones are started.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import fcntl
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

PROGRAMS = {
    "onellm": "onellm_dist.cli:main",
    "deepspeed": "deepspeed.launcher.runner:main",
    "torchrun": "torch.distributed.run:main",
}
PARENT_VARIABLE = "ONELLM_LOCAL_PARENT"
"""As in onellm_dist.launch.local: a rank ends with this process, its parent."""
CLIENT = """\
#!{python} -IS
import os, signal, socket, sys
import ctypes, json
parent = os.environ.get("{variable}")
if parent:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)
order = {{"argv": sys.argv, "cwd": os.getcwd(), "env": dict(os.environ)}}
ignored = [n for n in range(1, 32) if signal.getsignal(n) == signal.SIG_IGN and n != signal.SIGPIPE]
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
for number in {{1, 2, 3, 10, 12, 15}} - set(ignored):
    signal.signal(number, lambda number, _: server.send(bytes([number])))
data = json.dumps({{**order, "ignored": ignored}}).encode()
socket.send_fds(server, [len(data).to_bytes(8, "big")], [0, 1, 2])
server.sendall(data)
said = b""
while len(said) < 4:
    more = server.recv(4)
    if not more:
        os._exit(70)
    said += more
code = int.from_bytes(said, "big", signed=True)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (9, 19) else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


FOLDER_VARIABLE = "ONELLM_TEST_PROGRAMS"
"""Where the programs of this run are."""


def open_folder() -> Callable[[], None]:
    """Make the folder of the programs of a run; return what ends them and removes it.

    The programs have this process's environment, and not that of the test that starts them first.
    """
    folder = Path(tempfile.mkdtemp(prefix="programs-"))
    os.mkfifo(folder / "alive")
    writer = os.open(folder / "alive", os.O_RDWR)  # closed when this process ends, however it does
    root = str(Path(__file__).parents[2])
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": root}
    (folder / "environment").write_text(json.dumps({**os.environ, **own}))
    os.environ[FOLDER_VARIABLE] = str(folder)

    def close() -> None:
        os.environ.pop(FOLDER_VARIABLE, None)
        os.close(writer)
        shutil.rmtree(folder, ignore_errors=True)

    return close


def get_programs() -> Path:
    """The folder of the programs; it works until the tests' first process ends.

    With a GPU they are the real ones (CUDA does not outlive a fork), and with ONELLM_REAL_PROGRAMS.
    """
    import torch  # here: the process that starts the others needs none

    if torch.cuda.device_count() or os.environ.get("ONELLM_REAL_PROGRAMS"):
        return Path(sys.executable).parent
    folder = Path(os.environ[FOLDER_VARIABLE])
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_served(folder):
            _start_server(folder)
    return folder


def _is_served(folder: Path) -> bool:
    try:
        return Path("/proc", (folder / "pid").read_text()).exists()
    except FileNotFoundError:
        return False


def _start_server(folder: Path) -> None:
    address = folder / "socket"
    address.unlink(missing_ok=True)
    with (folder / "log").open("w") as log:
        started = subprocess.run(
            [sys.executable, "-u", __file__, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            check=True,
            cwd=folder,
            env=json.loads((folder / "environment").read_text()),
        )
    pid, deadline = started.stdout.decode().strip(), time.monotonic() + 600
    while not address.exists():
        running = Path("/proc", pid).exists()
        assert running and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)
    program = folder / "client"
    text = CLIENT.format(python=sys.executable, variable=PARENT_VARIABLE, address=str(address))
    program.write_text(text)
    program.chmod(0o755)
    for name in ("python", "python3", *PROGRAMS):
        if not (folder / name).exists():
            (folder / name).symlink_to(program)
    (folder / "pid").write_text(pid)


@dataclass
class _Child:
    """A program that runs."""

    pid: int
    client: socket.socket


class Server:
    """Forks programs until the tests' first process has ended."""

    def __init__(self, folder: Path) -> None:
        given = {*os.environ["PYTHONPATH"].split(os.pathsep), str(Path(__file__).parent)}
        self._folder, self._path = folder, [place for place in sys.path if place not in given]
        self._listener = socket.socket(socket.AF_UNIX)
        self._children: list[_Child] = []
        self._alive = os.open(folder / "alive", os.O_RDONLY | os.O_NONBLOCK)
        prepare()
        self._listener.bind(str(folder / "bound"))
        self._listener.listen(64)
        (folder / "bound").rename(folder / "socket")

    def serve(self) -> None:
        """Start programs, pass signals on to them, and report their exit codes."""
        while True:
            self._report_the_ended()
            clients = {child.client.fileno(): child for child in self._children}
            wanted: list[Any] = [self._alive, self._listener, *clients]
            timeout = 0.02 if clients else None
            for found in select.select(wanted, [], [], timeout)[0]:
                if found == self._alive:
                    self._end()
                    return
                if found is self._listener:
                    self._start(self._listener.accept()[0])
                else:
                    self._pass_signals_on(clients[found])

    def _end(self) -> None:
        for child in self._children:
            os.kill(child.pid, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _report_the_ended(self) -> None:
        for child in list(self._children):
            done, status = os.waitpid(child.pid, os.WNOHANG)
            if not done:
                continue
            code = os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):
                child.client.sendall(code.to_bytes(4, "big", signed=True))
            child.client.close()
            self._children.remove(child)

    def _pass_signals_on(self, child: _Child) -> None:
        """A client that was killed says nothing more: what it started ends as it did."""
        try:
            numbers = child.client.recv(64)
        except OSError:
            numbers = b""
        for number in numbers or bytes([signal.SIGKILL]):
            os.kill(child.pid, number)

    def _start(self, client: socket.socket) -> None:
        fds = array.array("i")
        size, said, _, _ = client.recvmsg(8, socket.CMSG_SPACE(3 * fds.itemsize))
        for _, _, data in said:
            fds.frombytes(data)
        try:
            order = json.loads(client.makefile("rb").read(int.from_bytes(size, "big")))
        except ValueError:  # it was killed before it had said all
            client.close()
            for fd in fds:
                os.close(fd)
            return
        server = os.getpid()
        pid = os.fork()
        if pid:
            for fd in fds:
                os.close(fd)
            self._children.append(_Child(pid, client))
            return
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        for connection in (client, self._listener, *(child.client for child in self._children)):
            connection.close()
        be_program(self._folder, self._path, order, server)


def prepare() -> None:
    """Import what most programs of the package import."""
    import zygote

    zygote.prepare()
    for name in (
        "deepspeed.launcher.runner",
        "deepspeed.launcher.launch",
        "torch.distributed.run",
        "onellm_dist.cli",
        "onellm_dist.evaluation.evaluate",
        "onellm_dist.planner.command",
        "onellm_dist.report",
        "onellm_dist.serving",
    ):
        importlib.import_module(name)
    zygote.freeze()


def be_program(folder: Path, path: list[str], order: dict[str, Any], server: int) -> NoReturn:
    """Run a program as if it had just been started, and end; it ends with the server."""
    from onellm_dist.common.processes import kill_with_parent

    kill_with_parent(server)
    os.setsid()
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    if PARENT_VARIABLE in os.environ:
        os.environ[PARENT_VARIABLE] = str(server)
    for number in order["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    name, arguments = Path(order["argv"][0]).name, order["argv"][1:]
    real, sys.executable = sys.executable, str(folder / "python")
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  # as the others, for the whole process
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    places = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:] = [*places, *path]
    forget_plugins()
    code = 0
    try:
        run_program(name, arguments, real)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    end_program(code)


def forget_plugins() -> None:
    """Let the registries look again: another path has other packages, and their entry points."""
    from onellm_dist.evaluation.tasks.registry import all_tasks
    from onellm_dist.modalities.registry import all_modalities
    from onellm_dist.shards.build.registry import all_sources

    for function in (all_modalities, all_sources, all_tasks):
        function.cache_clear()


def run_program(name: str, arguments: list[str], real: str) -> None:
    """Run one of `PROGRAMS`, or what Python is asked for."""
    if name in PROGRAMS:
        module, function = PROGRAMS[name].split(":")
        sys.argv = [str(Path(sys.executable).with_name(name)), *arguments]
        getattr(importlib.import_module(module), function)()
        return
    rest = arguments[1:] if arguments[:1] == ["-u"] else arguments
    if not rest or (rest[0].startswith("-") and rest[0] not in ("-c", "-m")):
        os.execv(real, [real, *arguments])  # options that this file does not know
    kind = rest.pop(0) if rest[0].startswith("-") else ""
    sys.argv = ["-c" if kind == "-c" else rest[0], *rest[1:]]
    first = {"-c": "", "-m": os.getcwd()}.get(kind, str(Path(rest[0]).resolve().parent))
    if not os.environ.get("PYTHONSAFEPATH"):
        sys.path.insert(0, first)
    if kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "":
        runpy.run_path(rest[0], run_name="__main__")
    else:
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)


def end_program(code: int) -> NoReturn:
    """End as Python does, without taking torch apart."""
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    if pid := os.fork():  # no child of a test process: it outlives that, and its own are not tests'
        print(pid)
        os._exit(0)
    os.setsid()
    os.dup2(2, 1)
    Server(Path(sys.argv[1])).serve()
    os._exit(0)
