"""The harness of the fuzz room: run mutated inputs through a function, and classify what happens.

A surface is a function that takes bytes, and seeds: whole inputs that mutations start from.

    def read_manifest(data: bytes) -> None:
        Manifest.from_bytes(data, Path("manifest.json"))

    def test_manifests() -> None:
        fuzz("manifest", read_manifest, [WHOLE], mutate_json, cases=4000).require_clean()

Where `ONELLM_FUZZ_GUIDED` says a number of seconds, `fuzz` then lets atheris search from the seeds
for so long, guided by the lines that it reaches (guided.py).

`fuzz` runs the cases in forked children with a limit of time and memory, so that a hang, a crash
or a huge allocation costs one case. Case i of a surface is the same in every run: a failure names
the number and shows the bytes, which then go to `corpus/<surface>/` for good: a surface's test
calls `replay(surface, run)` too.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import mmap
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from guided import fuzz_guided, get_guided_seconds
from outcomes import CRASH, FINE, HANG, REFUSED, FuzzFailure, FuzzReport, Surface, classify

from onellm_dist.common.errors import OneLLMError

_MARKS = {1: FINE, 2: REFUSED}
"""In shared memory: what became of a case."""
_FAILED = 3
SECONDS = 5.0
MEGABYTES = 1024
BATCH = 500
"""Cases a child process; the next one starts with fresh memory."""
CORPUS = Path(__file__).parent / "corpus"

Mutator = Callable[[random.Random, Sequence[bytes]], bytes]


def fuzz(
    surface: str,
    run: Surface,
    seeds: Sequence[bytes],
    mutate: Mutator,
    *,
    cases: int,
    allowed: tuple[type[BaseException], ...] = (OneLLMError,),
    seconds: float = SECONDS,
    megabytes: int = MEGABYTES,
    most_failures: int = 40,
) -> FuzzReport:
    """Run mutated inputs through a surface.

    Args:
        surface: its name, which seeds the mutations.
        run: takes the bytes. An AssertionError means "silently wrong".
        seeds: whole inputs. Each must be fine; they are tried first.
        mutate: makes one input of the seeds (see mutators.py).
        cases: how many inputs.
        allowed: exceptions that are refusals in words; their text must not be empty.
        seconds: a case that takes longer hangs.
        megabytes: memory that a case may add to what the process has.
        most_failures: stop after so many.
    """
    for seed in seeds:
        run(seed)
    report = FuzzReport(surface)
    started = time.monotonic()

    def make(case: int) -> bytes:
        return mutate(random.Random(f"{surface} {case}"), seeds)

    case = 0
    while case < cases and len(report.failures) < most_failures:
        last = min(case + BATCH, cases)
        for number, outcome, detail in _run_batch(
            run, make, range(case, last), allowed, seconds, megabytes
        ):
            report.counts[outcome] += 1
            if outcome not in (FINE, REFUSED):
                report.failures.append(FuzzFailure(number, outcome, detail, make(number)))
            case = number + 1
    report.seconds = time.monotonic() - started
    if not report.failures and (guided := get_guided_seconds()):
        print(report)
        return fuzz_guided(report, run, seeds, allowed, guided, seconds, megabytes)
    return report


def replay(
    surface: str, run: Surface, allowed: tuple[type[BaseException], ...] = (OneLLMError,)
) -> None:
    """Run the corpus of a surface: inputs that once failed are fine, or refused in words."""
    files = sorted((CORPUS / surface).iterdir())
    assert files, f"{CORPUS / surface} is empty"
    inputs = [path.read_bytes() for path in files]
    batch = _run_batch(run, inputs.__getitem__, range(len(files)), allowed, SECONDS, MEGABYTES)
    for number, outcome, detail in batch:
        assert outcome in (FINE, REFUSED), f"{files[number]}: {outcome}: {detail}"


def _run_batch(
    run: Surface,
    make: Callable[[int], bytes],
    numbers: range,
    allowed: tuple[type[BaseException], ...],
    seconds: float,
    megabytes: int,
) -> Iterator[tuple[int, str, str]]:
    """Yield (case, outcome, detail) of the cases that one child runs.

    The child marks each case in shared memory when it is done, and writes a line about each that
    failed. A case that hangs or crashes ends the child, and with it the batch.
    """
    done = mmap.mmap(-1, len(numbers) + 1)
    with tempfile.TemporaryFile() as failures:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            _be_child(run, make, numbers, allowed, megabytes, done, failures.fileno())
        status = _wait_for_child(child, done, len(numbers), seconds)
        failures.seek(0)
        details = dict(json.loads(line) for line in failures)
    for place, number in enumerate(numbers):
        mark = done[place]
        if mark:
            yield number, *((_MARKS[mark], "") if mark in _MARKS else details[number])
        else:
            if status is None:
                yield number, HANG, f"longer than {seconds:g} s"
            else:
                yield number, CRASH, f"the process ended with wait status {status}"
            return


def _wait_for_child(child: int, done: mmap.mmap, cases: int, seconds: float) -> int | None:
    """Wait until the child ends, and return its status; None: it hung, and was killed.

    On a busy machine a child that wants to run, and could not, has up to ten times as long.
    """
    place, since, used = 0, time.monotonic(), 0.0
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        before = place
        while place < cases and done[place]:
            place += 1
        waited = time.monotonic() - since
        if place != before or not waited:
            since, used = time.monotonic(), _get_cpu_seconds(child)[1]
        elif waited > seconds:
            state, now = _get_cpu_seconds(child)
            if state == "S" or now - used >= 0.8 * seconds or waited > 10 * seconds:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return None
        time.sleep(0.01)


def _get_cpu_seconds(process: int) -> tuple[str, float]:
    """State of a process (R runs or wants to, S sleeps), and the CPU time that it has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _be_child(
    run: Surface,
    make: Callable[[int], bytes],
    numbers: range,
    allowed: tuple[type[BaseException], ...],
    megabytes: int,
    done: mmap.mmap,
    failures: int,
) -> None:
    """Run the cases, mark each, and end the process without any clean-up."""
    try:
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (used + (megabytes << 20),) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        gc.disable()
        gc.freeze()  # so that collecting does not walk through all that the tests have imported
        for place, number in enumerate(numbers):
            outcome, detail = classify(run, make(number), allowed)
            mark = next((m for m, name in _MARKS.items() if name == outcome), _FAILED)
            if mark == _FAILED:
                os.write(failures, json.dumps([number, [outcome, detail]]).encode() + b"\n")
            done[place] = mark
            if number % 5 == 0:  # frames of a film lie in cycles, 9 MB each
                gc.collect()
    finally:
        os._exit(0)
