"""Ranks without their imports: a process that has imported everything forks the ranks of a start.

Run as a program, it reads a JSON line per start, and answers one, then one for each process that
ends. `Zygote` is its client. A start of two ranks costs a second on two cores instead of fifteen:
the kill tests need dozens. `get_zygote` gives the one of this test process.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from forked_python import get_programs


def serve() -> None:
    """The program."""
    with contextlib.redirect_stdout(sys.stderr):
        prepare()
    _answer({"ready": os.getpid()})
    children: dict[int, int] = {}
    """Pid -> number of the process: a pid may come again."""
    started = 0
    while True:
        for pid in list(children):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                _answer({"number": children.pop(pid), "code": code})
        if select.select([sys.stdin], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            if not line:
                return
            order = json.loads(line)
            pids = [_fork(order, rank) for rank in range(order["world_size"])]
            children |= {pid: started + rank for rank, pid in enumerate(pids)}
            _answer({"pids": pids, "first": started})
            started += len(pids)


def prepare() -> None:
    """Import and make what ranks would each import and make."""
    from torch.utils import tensorboard  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import onellm_dist.train.setup
    import onellm_dist.train.trainer  # noqa: F401
    from onellm_dist.model.folder_code.files import build_files
    from onellm_dist.train.engine.deepspeed.engine import import_deepspeed
    from onellm_dist.train.optim.optimizers import make_optimizer  # noqa: F401

    import_deepspeed()
    build_files()
    freeze()


def freeze() -> None:
    """Let no collection of a forked process walk through, and so copy, what was imported."""
    gc.collect()
    gc.freeze()


def _answer(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def _fork(order: dict[str, Any], rank: int) -> int:
    parent = os.getpid()
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        _be_rank(order, rank, parent)
    return pid


def _be_rank(order: dict[str, Any], rank: int, parent: int) -> NoReturn:
    from planted import plant

    from onellm_dist.launch.local import PARENT_VARIABLE
    from onellm_dist.launch.ranks import discover_ranks
    from onellm_dist.train.run import run_rank

    os.setsid()
    log = os.open(f"{order['logs']}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(log, number)
    os.close(0)
    world_size = str(order["world_size"])
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=world_size,
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=world_size,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(order["port"]),
        **{PARENT_VARIABLE: str(parent)},
    )
    if order["script"]:
        _run_script(*order["script"])
    plant(order["plant"], rank)
    ranks = discover_ranks()
    assert ranks is not None
    run_rank(Path(order["recipe"]), order["overrides"], ranks)


def _run_script(path: str, *arguments: str) -> NoReturn:
    """Run a program as `python path arguments` would."""
    sys.argv, sys.path[0] = [path, *arguments], str(Path(path).parent)
    code = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def run_ranks(script: Path, arguments: list[str], world_size: int, timeout: float = 800) -> None:
    """Run a program as local ranks, forked by the zygote; all of them must end with 0."""
    start = get_zygote().start(world_size, [], script=[str(script), *arguments])
    start.wait_unless_one_fails(timeout)


@cache
def get_zygote() -> Zygote:
    """The zygote that all tests of this process share; it ends with the process."""
    zygote = Zygote(Path(tempfile.mkdtemp(prefix="zygote-")))
    atexit.register(zygote.close)
    return zygote


class Zygote:
    """Starts runs through the program."""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self._logs, self._number = logs, 0
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        python = get_programs() / "python"  # it has imported everything
        with (logs / "zygote.log").open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), "-u", __file__, sys.executable],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=env,
            )
        self._codes: dict[int, int] = {}  # by the number of the process
        self._heard = b""
        assert self._hear(300) is not None, (logs / "zygote.log").read_text()

    def close(self) -> None:
        """End the program, and remove what it and its ranks printed."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        shutil.rmtree(self._logs, ignore_errors=True)

    def start(
        self,
        world_size: int,
        overrides: list[str],
        plant: dict[str, Any] | None = None,
        *,
        recipe: str = "toy/align_image",
        script: list[str] | None = None,
    ) -> Start:
        """Fork the ranks of a start.

        Args:
            world_size: number of ranks.
            overrides: keys of the recipe, as `train.steps=3`.
            plant: faults, as in planted.py.
            recipe: name or path of the recipe.
            script: a program and its arguments, which the ranks run instead of a recipe.
        """
        from onellm_dist.launch.local import find_free_port

        self._number += 1
        logs = self._logs / f"start{self._number:03d}"
        order = {
            "world_size": world_size,
            "overrides": overrides,
            "recipe": recipe,
            "port": find_free_port(),
            "plant": plant or {},
            "script": script,
            "logs": str(logs),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        while True:
            heard = self._hear(60)
            assert heard is not None, "the zygote does not answer"
            if "pids" in heard:
                numbers = range(heard["first"], heard["first"] + world_size)
                return Start(self, dict(zip(numbers, heard["pids"], strict=True)), logs)

    def codes(self, numbers: Collection[int], timeout: float) -> list[int]:
        """Exit codes of processes, waited for."""
        deadline = time.monotonic() + timeout
        while running := [number for number in numbers if number not in self._codes]:
            left = deadline - time.monotonic()
            assert left > 0, f"{len(running)} of {len(numbers)} still run"
            self._hear(min(left, 0.5))
        return [self._codes[number] for number in numbers]

    def failed(self, numbers: Collection[int], timeout: float) -> bool:
        """Whether one of them has failed, or not all have ended in time."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            known = [self._codes[number] for number in numbers if number in self._codes]
            if any(known) or len(known) == len(numbers):
                return any(known)
            self._hear(0.5)
        return True

    def running(self, numbers: Collection[int]) -> list[int]:
        """Those that have not ended."""
        while self._hear(0) is not None:
            pass
        return [number for number in numbers if number not in self._codes]

    def _hear(self, timeout: float) -> dict[str, Any] | None:
        assert self._process.stdout is not None
        while (
            b"\n" not in self._heard
        ):  # what came together with an earlier line is still here, where select does not look
            if not select.select([self._process.stdout], [], [], timeout)[0]:
                return None
            data = os.read(self._process.stdout.fileno(), 65536)
            assert data, "the zygote is gone: " + (self._logs / "zygote.log").read_text()
            self._heard += data
        line, _, self._heard = self._heard.partition(b"\n")
        heard: dict[str, Any] = json.loads(line)
        if "code" in heard:
            self._codes[heard["number"]] = heard["code"]
        return heard


class Start:
    """The ranks of one start."""

    def __init__(self, zygote: Zygote, pids: dict[int, int], logs: Path) -> None:
        self._zygote, self._pids, self._logs = zygote, pids, logs

    @property
    def pids(self) -> list[int]:
        """Pids, by rank."""
        return list(self._pids.values())

    def wait(self, timeout: float = 300) -> list[int]:
        """Exit codes, by rank."""
        return self._zygote.codes(self._pids, timeout)

    def code(self, timeout: float = 300) -> int:
        """The first exit code other than 0 (a signal's is negative); 0: every rank ended with 0."""
        return next(filter(None, self.wait(timeout)), 0)

    def done(self, timeout: float = 300) -> None:
        """Every rank ends with 0."""
        codes = self.wait(timeout)
        assert codes == [0] * len(codes), self.output()

    def wait_unless_one_fails(self, timeout: float) -> None:
        """Every rank ends with 0; if one does not, the others, which wait for it, are killed."""
        if self._zygote.failed(self._pids, timeout):
            self.kill()
            raise AssertionError(self.output())

    @property
    def ended(self) -> bool:
        """Every rank has ended."""
        return not self._zygote.running(self._pids)

    def kill(self) -> None:
        """SIGKILL to every rank that runs: the pid of one that ended may be another's by now."""
        for number in self._zygote.running(self._pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pids[number], 9)
        self.wait()

    def output(self) -> str:
        """What the ranks printed."""
        return "\n".join(
            path.read_text(errors="replace")
            for path in sorted(self._logs.parent.glob(f"{self._logs.name}-*.log"))
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.executable = sys.argv[1]  # ranks start real programs
    serve()
    os._exit(0)  # nothing to clean up, and torch takes seconds for it
