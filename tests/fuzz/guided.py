"""Fuzzing that is guided by coverage: atheris mutates the inputs that reach new lines.

It runs in a forked child, on functions that are already imported: those of the product are given
atheris's counters. What it finds is reported as `fuzz` does, with the input.
"""

from __future__ import annotations

import base64
import faulthandler
import gc
import importlib.util
import json
import mmap
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn

import torch
from outcomes import CRASH, FINE, HANG, REFUSED, FuzzFailure, FuzzReport, Surface, classify

VARIABLE = "ONELLM_FUZZ_GUIDED"
_MOST_KINDS = 20
"""Kinds of failure after which the search ends."""
_SEARCH_MB = 512
"""Memory of libFuzzer: its corpus and its counters."""
_PATIENCE_S = 90
"""What a child may take beyond its time, to start and to end."""


def get_guided_seconds() -> int:
    """For how long each surface is searched; 0: not at all, or atheris is not installed."""
    seconds = int(os.environ.get(VARIABLE) or 0)
    if seconds and importlib.util.find_spec("atheris") is None:
        warnings.warn("atheris is not installed: nothing is searched by coverage", stacklevel=2)
        return 0
    return seconds


def fuzz_guided(
    report: FuzzReport,
    run: Surface,
    seeds: Sequence[bytes],
    allowed: tuple[type[BaseException], ...],
    duration: int,
    seconds: float,
    megabytes: int,
) -> FuzzReport:
    """Search a surface for inputs that fail, and add what was found to its report.

    Args:
        report: of the surface's mutated cases.
        run: the surface.
        seeds: inputs that the search starts from.
        allowed: exceptions that are refusals in words.
        duration: seconds that the search takes.
        seconds: an input that takes longer hangs.
        megabytes: memory that inputs may add to what the process has, beyond that of the search.
    """
    with tempfile.TemporaryDirectory(prefix="guided-") as name:
        folder = Path(name)
        (folder / "seeds").mkdir()
        (folder / "found").mkdir()
        (folder / "failures.jsonl").touch()
        (folder / "log").touch()
        for number, seed in enumerate(seeds):
            (folder / "seeds" / str(number)).write_bytes(seed)
        counts = Counts()
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if not child:
            _be_child(folder, counts, run, allowed, duration, seconds, megabytes)
        status = _wait(child, duration + _PATIENCE_S)
        _collect(report, folder, counts, status)
    report.seconds += duration
    return report


class Counts:
    """How many inputs were fine or refused, in memory that outlives the child, however it ends."""

    _OUTCOMES = (FINE, REFUSED)

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * len(self._OUTCOMES))
        self._numbers = memoryview(self._memory).cast("Q")

    def add(self, outcome: str) -> bool:
        """Count an outcome; False: it is a failure."""
        if outcome not in self._OUTCOMES:
            return False
        self._numbers[self._OUTCOMES.index(outcome)] += 1
        return True

    def read(self) -> dict[str, int]:
        """Outcome -> its number of inputs, of those that occurred."""
        return {o: n for o, n in zip(self._OUTCOMES, self._numbers, strict=True) if n}


def _wait(child: int, seconds: float) -> int | None:
    """The wait status of the child; None: it was killed, for it had not ended in time."""
    deadline = time.monotonic() + seconds
    pid = 0
    try:
        while time.monotonic() < deadline:
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                return status
            time.sleep(0.1)
        return None
    finally:
        if not pid:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _collect(report: FuzzReport, folder: Path, counts: Counts, status: int | None) -> None:
    report.counts.update(counts.read())
    for line in (folder / "failures.jsonl").read_text().splitlines():
        outcome, detail, text = json.loads(line)
        report.counts[outcome] += 1
        report.failures.append(FuzzFailure(-1, outcome, detail, base64.b64decode(text)))
    for path in sorted((folder / "found").iterdir()):  # inputs that ended the process
        outcome = HANG if path.name.startswith("timeout") else CRASH
        report.counts[outcome] += 1
        report.failures.append(FuzzFailure(-1, outcome, path.name, path.read_bytes()))
    if (status is None or status) and not report.failures:
        log = (folder / "log").read_text(errors="replace")
        raise AssertionError(f"the search ended with wait status {status}:\n{log[-3000:]}")


def _be_child(
    folder: Path,
    counts: Counts,
    run: Surface,
    allowed: tuple[type[BaseException], ...],
    duration: int,
    seconds: float,
    megabytes: int,
) -> NoReturn:
    """Search, and end the process without any clean-up."""
    try:
        import atheris

        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        failures = (folder / "failures.jsonl").open("w", buffering=1)
        _instrument(atheris, run)
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + (megabytes + _SEARCH_MB << 20),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        kinds = set[str]()

        def try_one(data: bytes) -> None:
            outcome, detail = classify(run, data, allowed)
            if not counts.add(outcome) and f"{outcome} {detail}" not in kinds:
                kinds.add(f"{outcome} {detail}")
                line = [outcome, detail, base64.b64encode(data).decode()]
                failures.write(json.dumps(line) + "\n")
            if len(kinds) == _MOST_KINDS:
                os._exit(0)

        options = [
            f"-max_total_time={duration}",
            f"-timeout={max(1, round(10 * seconds))}",  # by the wall clock of a busy machine
            "-rss_limit_mb=0",
            f"-artifact_prefix={folder / 'found'}/",
            str(folder / "seeds"),
        ]
        atheris.Setup(["fuzz", *options], try_one)
        atheris.Fuzz()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def _instrument(atheris: Any, run: Surface) -> None:
    """Give the product's functions, and the surface's own, atheris's counters."""
    for found in gc.get_objects():
        if isinstance(found, FunctionType) and (
            found is run or str(found.__module__).startswith("onellm_dist")
        ):
            atheris.instrument_func(found)
