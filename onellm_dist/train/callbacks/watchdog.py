"""The hang watchdog: a thread per rank that ends a run without progress, and says which rank hung.

The first rank that notices raises an alarm (a file in `<run.dir>/hangs/`). Every rank that sees it
writes `rank-00000.txt` (all its Python stacks, the samples of its micro-batch) and
`rank-00000.json` (what it was doing). From these each rank finds out for which rank the others
waited, `exit.json` says so, and all processes end, loader workers included. No collective and no
message of the process group is used.
"""

from __future__ import annotations

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

from onellm_dist.common.files import stamp_file
from onellm_dist.common.logging import get_logger
from onellm_dist.common.run_files import HANGS
from onellm_dist.config.schema import StabilitySection
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.engine.select import all_engines
from onellm_dist.train.records.exit_file import ExitFile
from onellm_dist.train.records.run_directory import move_hangs_aside

log = get_logger(__name__)
ALARM = "alarm"
WRAPPERS = tuple(file for engine in all_engines().values() for file in engine.wrapper_files)
"""Files that wrap calls of any kind: the caller of such a call counts."""
ANSWER_SECONDS = 20.0
"""Seconds after the alarm in which ranks report; silent ones are held responsible."""
LAST_RESORT_SECONDS = 60.0
"""Seconds after which a rank ends even if its disk hangs too."""
IN_COLLECTIVE = (
    "torch/distributed/",
    "torch/cuda/",
    "onellm_dist/train/totals.py",
    "onellm_dist/train/engine/",
    *(file for engine in all_engines().values() for file in engine.waiting_files),
)
"""A thread whose innermost Python frame is in such a file waits for other ranks.

On a GPU, collectives are queued. A rank waits for them where the host next waits for the device:
for a stream or an event (torch/cuda/), for the sums of the step, for the gradient norm (the engines
read it)."""


class HangWatchdog(Callback):
    """Watches this rank from `start` to `close`.

    Args:
        run_dir: the run directory.
        rank: this rank.
        world_size: number of ranks.
        config: the `stability` section.
        exit_file: where a hang is recorded; its heartbeat is watched.
        end_process: ends the process with an exit code; default: the hang is only reported, and the
            collective's own timeout, five minutes later, raises an error.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        rank: int,
        world_size: int,
        config: StabilitySection,
        exit_file: ExitFile,
        end_process: Callable[[int], Any] | None = None,
    ) -> None:
        self._folder = run_dir / HANGS
        self._rank = rank
        self._world_size = world_size
        self._config = config
        self._exit_file = exit_file
        self._heartbeat = exit_file.heartbeat
        self._end_process = end_process
        self._earlier_alarm = stamp_file(self._folder / ALARM)
        """The alarm of an earlier start that hung, which is moved aside when this one has begun."""
        self._poll = min(5.0, max(0.05, 60 * config.hang_minutes / 20))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch, unless `stability.hang_minutes` is 0."""
        if self._config.hang_minutes:
            self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)

    @property
    def is_watching(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def limit_seconds(self) -> float:
        """Seconds without progress that the present phase may take."""
        config = self._config
        if not self._heartbeat.first_step_done:
            return 60 * config.first_step_minutes
        minutes = {
            "checkpoint": config.checkpoint_minutes,
            "export": config.checkpoint_minutes,
            "validation": config.validation_minutes,
        }
        return 60 * minutes.get(self._heartbeat.phase, config.hang_minutes)

    def _watch(self) -> None:
        idle = 0.0
        seen = -1
        looked = time.monotonic()
        while not self._closed.wait(self._poll):
            now = time.monotonic()
            # A process that was suspended has not hung: no look counts for more than two.
            passed = min(now - looked, 2 * self._poll)
            looked = now
            count = self._heartbeat.count
            idle = idle + passed if count == seen else 0.0
            seen = count
            if idle >= self.limit_seconds() or self._is_alarm_raised():
                self._report_hang(idle)
                return

    def _is_alarm_raised(self) -> bool:
        return stamp_file(self._folder / ALARM) not in (None, self._earlier_alarm)

    def _report_hang(self, idle: float) -> None:
        if self._end_process is not None:
            last_resort = threading.Timer(LAST_RESORT_SECONDS, self._end_process, (1,))
            last_resort.daemon = True
            last_resort.start()
        try:
            if self._earlier_alarm is not None and not self._is_alarm_raised():
                move_hangs_aside(self._folder.parent)
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / ALARM).touch()
            self._write_own(idle)
            reports = self._wait_for_reports()
            responsible, why = find_responsible_ranks(reports, self._world_size)
            self._record(idle, responsible, why, reports)
        except Exception as error:  # whatever it is: the rank must end
            log.error("rank %d hangs, and its report is not complete: %r", self._rank, error)
        if self._end_process is not None:
            end_children()
            self._end_process(1)

    def _write_own(self, idle: float) -> None:
        """Write this rank's stacks, and what it is doing."""
        status = {
            **self._heartbeat.to_json(),
            "rank": self._rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "idle_seconds": round(idle, 1),
            "in_collective": is_in_collective(sys._current_frames(), threading.get_ident()),
        }
        rows = self._heartbeat.sample_rows()
        with (self._folder / f"rank-{self._rank:05d}.txt").open("w", encoding="utf-8") as out:
            out.write("\n".join(f"{key}: {value}" for key, value in status.items()) + "\n\n")
            out.write(format_stacks(sys._current_frames()))
            samples = "\n".join(map(str, rows)) or "none"
            out.write(f"\nthe samples of the micro-batch:\n{samples}\n")
        # Loader workers end a sample that hangs; what hangs there is a disk.
        is_reading = status["phase"] == "data" and self._heartbeat.loader_workers > 0
        report = {**status, "samples": [] if is_reading else [row["sample"] for row in rows]}
        staged = self._folder / f".rank-{self._rank:05d}.json"
        staged.write_text(json.dumps(report), encoding="utf-8")  # not synced: the disk may hang
        staged.rename(_report_path(self._folder, self._rank))

    def _wait_for_reports(self) -> dict[int, dict[str, Any]]:
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            found = {}
            for rank in range(self._world_size):
                path = _report_path(self._folder, rank)
                if path.exists():
                    found[rank] = json.loads(path.read_text(encoding="utf-8"))
            if len(found) == self._world_size or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def _record(
        self, idle: float, responsible: list[int], why: str, reports: Mapping[int, dict[str, Any]]
    ) -> None:
        first = reports.get(responsible[0], {}) if responsible else {}
        about = first or reports.get(self._rank, {})
        seconds = max((float(entry["idle_seconds"]) for entry in reports.values()), default=idle)
        who = (
            f"rank {', '.join(map(str, responsible[:8]))} {why}"
            if responsible
            else "no rank stands out"
        )
        where = f", in phase {first['phase']}" if first else ""
        reason = (
            f"hang: no progress for {seconds:.0f} s in step {about.get('step')}; {who}{where}; "
            f"stacks of every rank are in {self._folder}"
        )
        log.error("rank %d: %s", self._rank, reason)
        self._exit_file.write(
            "failed",
            reason=reason,
            failure="hang",
            failed_step=about.get("step"),
            offending_samples=about.get("samples", []),
            responsible_rank=responsible[0] if responsible else None,
            responsible_ranks=responsible,
            responsible_host=first.get("host"),
        )


def find_responsible_ranks(
    reports: Mapping[int, Mapping[str, Any]], world_size: int
) -> tuple[list[int], str]:
    """Which ranks the others waited for, and why they are held responsible.

    These are the ranks that did not report; else those that wait for nobody while others wait; else
    those that are furthest behind.

    Args:
        reports: rank -> what it was doing.
        world_size: number of ranks.
    """
    silent = [rank for rank in range(world_size) if rank not in reports]
    if silent:
        return silent, "did not answer (dead, stopped, or held in C code)"
    busy = [rank for rank in range(world_size) if not reports[rank]["in_collective"]]
    if busy and len(busy) < world_size:
        return busy, "waits for nobody while the others wait"
    counts = [int(reports[rank]["heartbeats"]) for rank in range(world_size)]
    behind = [rank for rank in range(world_size) if counts[rank] == min(counts)]
    if len(behind) < world_size:
        return behind, "is furthest behind"
    return (busy, "waits for nobody") if world_size == 1 else ([], "")


def is_in_collective(frames: Mapping[int, FrameType], own_thread: int) -> bool:
    """Whether a thread of this process, except `own_thread`, waits for other ranks."""
    innermost = [_innermost_file(frame) for thread, frame in frames.items() if thread != own_thread]
    return any(part in name for name in innermost for part in IN_COLLECTIVE)


def format_stacks(frames: Mapping[int, FrameType]) -> str:
    """Return the stacks of all threads, innermost call first, the main thread before the others.

    `faulthandler` leaves out threads past the hundredth, and the main thread is its last;
    `traceback` reads source files, and their disk may be what hangs.

    Args:
        frames: thread -> innermost frame, as of `sys._current_frames`.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    lines = []
    for thread in sorted(frames, key=lambda thread: thread != main):
        lines.append(f"thread {thread:#x} ({names.get(thread, 'not started by Python')}):")
        frame: FrameType | None = frames[thread]
        while frame is not None:
            code = frame.f_code
            lines.append(f'  File "{code.co_filename}", line {frame.f_lineno} in {code.co_name}')
            frame = frame.f_back
        lines.append("")
    return "\n".join(lines) + "\n"


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


def _report_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"
