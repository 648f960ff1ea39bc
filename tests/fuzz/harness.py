"""The harness of the fuzz room: run mutated inputs through a function, and classify what happens.

A surface is a function that takes bytes, and seeds: whole inputs that mutations start from.

    def read_manifest(data: bytes) -> None:
        Manifest.from_bytes(data, Path("manifest.json"))

    def test_manifests() -> None:
        fuzz("manifest", read_manifest, [WHOLE], mutate_json, cases=4000).require_clean()

`fuzz` runs the cases in forked children with a limit of time and memory, so that a hang, a crash
or a huge allocation costs one case. Case i of a surface is the same in every run: a failure names
the number and shows the bytes, which then go to `corpus/<surface>/` for good: a surface's test
calls `replay(surface, run)` too.
"""

from __future__ import annotations

import base64
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
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onellm_dist.common.errors import OneLLMError

FINE = "fine"
"""The input was read, and the surface's own assertions about it held."""
REFUSED = "refused in words"
"""An error of the product's own, with a reason."""
RAW = "raw"
"""Another exception, or one whose words are of another kind than the product's."""
WRONG = "silently wrong"
"""An assertion of the surface failed: a value came back that is not the true one."""
HANG = "hang"
MEMORY = "memory"
CRASH = "crash"
"""The process died (SIGSEGV, the interpreter's end)."""
_MARKS = {1: FINE, 2: REFUSED}
"""In shared memory: what became of a case."""
_FAILED = 3
SECONDS = 5.0
MEGABYTES = 1024
BATCH = 500
"""Cases a child process; the next one starts with fresh memory."""
CORPUS = Path(__file__).parent / "corpus"

Surface = Callable[[bytes], object]
Mutator = Callable[[random.Random, Sequence[bytes]], bytes]


@dataclass(frozen=True)
class FuzzFailure:
    """One case that was neither fine nor refused in words."""

    case: int
    outcome: str
    detail: str
    data: bytes

    def __str__(self) -> str:
        """Case, outcome, where it happened, and the input (its start, if it is long)."""
        text = base64.b64encode(self.data[:3000]).decode()
        return f"case {self.case}: {self.outcome}: {self.detail}\n  base64 of the input: {text}"


@dataclass
class FuzzReport:
    """What happened to all cases of a surface."""

    surface: str
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[FuzzFailure] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        """How many inputs were tried."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        """One line of figures."""
        found = ", ".join(f"{count} {name}" for name, count in sorted(self.counts.items()))
        return f"{self.surface}: {self.cases} cases in {self.seconds:.1f} s: {found}"

    def require_clean(self, least_refused: int = 1) -> None:
        """Fail unless every case was fine or refused in words, and some were refused.

        Args:
            least_refused: a fuzzer whose inputs are all fine has tried nothing.
        """
        print(self)
        kinds = {f"{f.outcome}: {f.detail}": f for f in reversed(self.failures)}
        shown = "\n".join(str(f) for f in sorted(kinds.values(), key=lambda f: f.case)[:8])
        assert not self.failures, f"{self}\n{len(kinds)} kinds of failure\n{shown}"
        assert self.counts[REFUSED] >= least_refused, str(self)


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


def classify(
    run: Surface, data: bytes, allowed: tuple[type[BaseException], ...]
) -> tuple[str, str]:
    """Run one input in this process; return its outcome and where an exception came from."""
    try:
        run(data)
    except allowed as error:
        return (
            (REFUSED, "") if str(error).strip() else (RAW, f"{type(error).__name__} without words")
        )
    except AssertionError as error:
        return WRONG, _describe(error)
    except MemoryError as error:
        return MEMORY, _describe(error)
    except Exception as error:
        return RAW, _describe(error)
    return FINE, ""


def _describe(error: BaseException) -> str:
    """Exception, its first line, and the innermost line of the product that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "onellm_dist" in f.filename] or frames[-1:]
    where = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return (
        f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}{where}"
    )


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
        gc.disable()
        gc.freeze()  # so that collecting does not walk through all that the tests have imported
        for place, number in enumerate(numbers):
            outcome, detail = classify(run, make(number), allowed)
            mark = next((m for m, name in _MARKS.items() if name == outcome), _FAILED)
            if mark == _FAILED:
                os.write(failures, json.dumps([number, [outcome, detail]]).encode() + b"\n")
            done[place] = mark
            if number % 50 == 0:
                gc.collect()
    finally:
        os._exit(0)
