"""The starts of a run in order, complete with their steps, ends and start-up timing."""

from __future__ import annotations

from onellm_dist.report.entries import to_number
from onellm_dist.report.lost_work import assign_steps, count_lost_steps, count_unsaved_steps
from onellm_dist.report.records import RunRecords
from onellm_dist.report.start_sources import CLOCK_TOLERANCE_S, collect_starts
from onellm_dist.report.starts import Start, compute_process_seconds, get_stall_seconds

ALIVE_S = 900.0
"""Without file locks, a run that wrote something within this time is taken to be running."""


def build_starts(records: RunRecords) -> list[Start]:
    """Every start of the run, numbered from 1."""
    starts = collect_starts(records)
    _fill_world_sizes(starts)
    assign_steps(records, starts)
    for start in starts:
        if not start.begin_known:
            start.begin -= compute_process_seconds(start)
    count_lost_steps(records, starts)
    _fill_ends(records, starts)
    count_unsaved_steps(records, starts)
    for index, start in enumerate(starts):
        start.number = index + 1
        _add_outer_startup(start, starts[index - 1] if index else None)
    return starts


def _fill_world_sizes(starts: list[Start]) -> None:
    """If no record has the number of ranks, take the ranks per node of another start."""
    per_node = next((s.world_size / s.nodes for s in starts if s.world_size and s.nodes), 1.0)
    for start in starts:
        start.world_size = start.world_size or max(1, round((start.nodes or 1) * per_node))


def _add_outer_startup(start: Start, previous: Start | None) -> None:
    """Add the parts that the run itself cannot see: the wait for nodes and the job script."""
    outer = dict[str, float]()
    if previous is not None and (previous.end_known or start.begin_known):
        outer["scheduler"] = max(0.0, start.begin - previous.end)
    if start.begin_known and start.trained_at is not None and start.startup_seconds:
        outer["job"] = max(0.0, start.trained_at - start.begin - compute_process_seconds(start))
    start.startup_seconds = {**outer, **start.startup_seconds}


def _fill_ends(records: RunRecords, starts: list[Start]) -> None:
    """Where no end was recorded: estimate it from the last sign of life, and find the status."""
    for i, start in enumerate(starts):
        if not start.end_known:
            seen = _estimate_last_seen(start)
            if i == len(starts) - 1:
                _fill_latest_end(records, start, seen)
            else:
                start.end = max(start.begin, min(seen, starts[i + 1].begin))
        start.status = start.status or "lost"
        if start.status == "lost":
            start.reason = start.reason or "no end was recorded: killed, or its node died"
        start.end = max(start.begin, start.end)
        if start.steps_done is None and start.first_step is not None:
            done = start.steps[-1]["step"] + 1 if start.steps else start.first_step
            start.steps_done = done + start.lost_steps


def _estimate_last_seen(start: Start) -> float:
    """When the start was last seen alive, in seconds since 1970."""
    written = (start.trained_at or start.begin) + start.lost_seconds + start.validation_seconds
    written += sum(to_number(line.get("seconds")) for line in start.steps)
    written += sum(get_stall_seconds(checkpoint) for checkpoint in start.checkpoints)
    times = [float(c["at"]) for c in start.checkpoints if c["at"] is not None]
    return max([written, *times])


def _fill_latest_end(records: RunRecords, start: Start, seen: float) -> None:
    """The end of the latest start: it may still be running, or `exit.json` describes its end."""
    end = records.exit
    if end is not None and (end.get("at") or 0.0) >= start.begin - CLOCK_TOLERANCE_S:
        start.status = start.status or str(end.get("status") or "")
        start.reason = start.reason or str(end.get("reason") or "")
        start.end = end.get("at") or seen
        if start.steps_done is None:
            start.steps_done = end.get("steps_done")
        if start.failed_step is None:
            start.failed_step = end.get("failed_step")
        samples = end.get("offending_samples") or ()
        start.offending_samples = start.offending_samples or [str(s) for s in samples]
    elif start.status != "lost" and (records.running or _seems_alive(records, start)):
        start.status = "running"
        start.reason = ""
        start.end = records.now
    else:
        start.end = max(seen, records.last_write or seen)


def _seems_alive(records: RunRecords, start: Start) -> bool:
    """Whether a start seems to be running although no lock says so.

    Something was written lately, or the job script began lately and no rank holds the directory
    yet.
    """
    lately = records.now - max(records.last_write or 0.0, start.begin) < ALIVE_S
    not_locked_yet = start.begin_known and start.first_step is None
    return lately and (records.running is None or not_locked_yet)
