"""Ends a run that hangs: a thread a rank that sees no progress writes this rank's stacks and plan, and the process goes.

The first rank that notices raises an alarm (a file in `<run.dir>/hangs/`); every rank that sees it writes `rank-00000.txt` (all its
Python stacks, the micro-step's samples) and `rank-00000.json` (what it was at). From these each finds which rank the others waited for,
`exit.json` says so, and all processes end, loader workers included. No collective and no message of the process group is used.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from onellm_dist.config.schema import StabilitySection
from onellm_dist.train.engine.select import all_engines
from onellm_dist.train.heartbeat import InFlight
from onellm_dist.train.records.exit_file import ExitFile

HANGS, ALARM = "hangs", "alarm"
WRAPPERS = tuple(file for engine in all_engines().values() for file in engine.wrapper_files)
"""Files that wrap calls of any kind: whoever called them counts."""
GRACE_S = 20.0
"""Seconds that the ranks have, after the alarm, to say what they are at; those that cannot are suspected."""
LAST_RESORT_S = 60.0
"""Seconds after which a rank ends even if its disk hangs too."""
IN_COLLECTIVE = (
    "torch/distributed/",
    "torch/cuda/",
    "onellm_dist/train/totals.py",
    "onellm_dist/train/engine/",
    *(file for engine in all_engines().values() for file in engine.waiting_files),
)
"""A thread whose innermost Python frame is in such a file waits for other ranks.

On a GPU collectives are queued, and a rank waits for them where the host next waits for the device: for a stream or an event (torch/cuda/),
for the sums of the step, for the gradient norm (the engines read it)."""


class Watchdog:
    """Watches this rank while it is open (`with`).

    Args:
        rank: this one, of `world`.
        end: how the process ends; `os._exit` where not given.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        world: int,
        config: StabilitySection,
        exit_file: ExitFile,
        *,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._folder, self._rank, self._world = run_dir / HANGS, rank, world
        self._config, self._exit_file, self._end = config, exit_file, end
        self._in_flight: InFlight = exit_file.in_flight
        self._poll = min(5.0, max(0.05, 60 * config.hang_minutes / 20))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._config.hang_minutes:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def limit(self) -> float:
        """Seconds without progress that the present phase may have."""
        phase, config = self._in_flight.phase, self._config
        if not self._in_flight.first_step_done:
            return 60 * config.first_step_minutes
        own = {
            "checkpoint": config.checkpoint_minutes,
            "export": config.checkpoint_minutes,
            "validation": config.validation_minutes,
        }
        return 60 * own.get(phase, config.hang_minutes)

    def _watch(self) -> None:
        idle, seen, looked = 0.0, -1, time.monotonic()
        while not self._closed.wait(self._poll):
            now = time.monotonic()
            # A process that was suspended has not hung: no look counts for more than two.
            step, looked = min(now - looked, 2 * self._poll), now
            beats = self._in_flight.beats
            idle, seen = (idle + step if beats == seen else 0.0), beats
            if idle >= self.limit() or (self._folder / ALARM).exists():
                self._hang(idle)
                return

    def _hang(self, idle: float) -> None:
        last_resort = threading.Timer(LAST_RESORT_S, self._end, (1,))
        last_resort.daemon = True
        last_resort.start()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / ALARM).touch()
            self._write_own(idle)
            found = self._wait_for_others()
            suspected, why = suspected_ranks(found, self._world)
            self._tell(idle, suspected, why, found)
        except Exception as error:  # whatever it is: the rank must end
            print(
                f"rank {self._rank}: hangs, and could not say all of it: {error!r}",
                file=sys.stderr,
                flush=True,
            )
        end_children()
        self._end(1)

    def _write_own(self, idle: float) -> None:
        about = {
            **self._in_flight.about(),
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "idle_seconds": round(idle, 1),
            "in_collective": in_collective(sys._current_frames(), threading.get_ident()),
        }
        with (self._folder / f"rank-{self._rank:05d}.txt").open("w", encoding="utf-8") as out:
            out.write("\n".join(f"{key}: {value}" for key, value in about.items()) + "\n\n")
            out.flush()
            faulthandler.dump_traceback(out, all_threads=True)
            out.flush()
            rows = self._in_flight.rows()
            out.write(
                "\nthe micro-step's samples:\n" + ("\n".join(map(str, rows)) or "none") + "\n"
            )
        aside = self._folder / f".rank-{self._rank:05d}.json"
        aside.write_text(
            json.dumps({**about, "samples": [row["sample"] for row in rows]}), encoding="utf-8"
        )
        aside.rename(_about_file(self._folder, self._rank))

    def _wait_for_others(self) -> dict[int, dict[str, Any]]:
        deadline = time.monotonic() + GRACE_S
        while True:
            found = {}
            for rank in range(self._world):
                path = _about_file(self._folder, rank)
                if path.exists():
                    found[rank] = json.loads(path.read_text(encoding="utf-8"))
            if len(found) == self._world or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def _tell(
        self, idle: float, suspected: list[int], why: str, found: Mapping[int, dict[str, Any]]
    ) -> None:
        first = found.get(suspected[0], {}) if suspected else {}
        own = found.get(self._rank, {})
        about = first or own
        limit = max((float(entry["idle_seconds"]) for entry in found.values()), default=idle)
        names = (
            "no rank stands out"
            if not suspected
            else f"rank {', '.join(map(str, suspected[:8]))} {why}"
        )
        where = f", in phase {first['phase']}" if first else ""
        reason = f"hang: no progress for {limit:.0f} s in step {about.get('step')}; {names}{where}; stacks of every rank are in {self._folder}"
        print(f"rank {self._rank}: {reason}", file=sys.stderr, flush=True)
        self._exit_file.write(
            "failed",
            reason=reason,
            kind="hang",
            failed_step=about.get("step"),
            offending_samples=about.get("samples", []),
            suspected_rank=suspected[0] if suspected else None,
            suspected_ranks=suspected,
            suspected_host=first.get("host"),
        )


def suspected_ranks(found: Mapping[int, Mapping[str, Any]], world: int) -> tuple[list[int], str]:
    """Which ranks the others waited for, and why they are thought to be it.

    Those that could not say anything; else those that wait for nobody while others wait; else those that are furthest behind.
    """
    silent = [rank for rank in range(world) if rank not in found]
    if silent:
        return silent, "did not answer (dead, stopped, or held in C code)"
    busy = [rank for rank in range(world) if not found[rank]["in_collective"]]
    if busy and len(busy) < world:
        return busy, "waits for nobody while the others wait"
    beats = [int(found[rank]["beats"]) for rank in range(world)]
    behind = [rank for rank in range(world) if beats[rank] == min(beats)]
    if len(behind) < world:
        return behind, "is furthest behind"
    return (busy, "waits for nobody") if world == 1 else ([], "")


def in_collective(frames: Mapping[int, FrameType], own_thread: int) -> bool:
    """Whether some thread of this process, the watching one apart, is in a call that waits for other ranks."""
    innermost = [_innermost_file(frame) for thread, frame in frames.items() if thread != own_thread]
    return any(part in name for name in innermost for part in IN_COLLECTIVE)


def _innermost_file(frame: FrameType) -> str:
    while frame.f_code.co_filename.endswith(WRAPPERS) and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename


def end_children() -> None:
    """Kill the processes that this one started: loader workers must not outlive it."""
    for child in psutil.Process().children(recursive=True):
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue


def put_hangs_aside(run_dir: Path) -> None:
    """Keep what an earlier start wrote about its hang, under another name. Rank 0 calls it before the ranks meet."""
    folder = run_dir / HANGS
    if folder.is_dir():
        folder.rename(run_dir / f"{HANGS}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")


def _about_file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"
