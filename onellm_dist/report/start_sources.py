"""What is known about one start: the run's own events and the job script's record, put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from onellm_dist.report.entries import Entry, pick, to_number, to_timestamp
from onellm_dist.report.records import RunRecords
from onellm_dist.report.starts import Start

CLOCK_TOLERANCE_S = 5.0
"""The clocks of the job script's node and of rank 0 may differ by this much."""


@dataclass
class StartEvents:
    """The events that the run itself wrote in one start."""

    start: Entry
    startup_seconds: dict[str, float] = field(default_factory=dict)
    end: Entry | None = None
    events: list[Entry] = field(default_factory=list)

    def add(self, event: Entry) -> None:
        """Add the next event of this start."""
        self.events.append(event)
        name = event.get("event")
        if name == "startup_timing":
            part = str(event.get("name"))
            seconds = to_number(event.get("seconds"))
            self.startup_seconds[part] = self.startup_seconds.get(part, 0.0) + seconds
        elif name == "end":
            self.end = event


def collect_starts(records: RunRecords) -> list[Start]:
    """Every start of the run in order of its begin, including those that never trained.

    A start is a `start` event, a line of the job script's `attempts.jsonl`, or both. They belong
    together if job and restart count are the same, or else if the event lies within the line's
    time.
    """
    attempts = _merge_attempts(records.attempts)
    matched = set[int]()
    starts = list[Start]()
    for events in _group_events(records.events):
        index = next(
            (
                i
                for i, attempt in enumerate(attempts)
                if i not in matched and _belong_together(attempt, events.start)
            ),
            None,
        )
        if index is not None:
            matched.add(index)
        starts.append(_build_start(records, events, {} if index is None else attempts[index]))
    for i, attempt in enumerate(attempts):
        if i not in matched:
            starts.append(_build_start(records, StartEvents({}), attempt))
    starts.sort(key=lambda start: start.begin)
    if not starts and records.steps:  # the events are gone, the steps are still there
        first = {"first_step": records.steps[0]["step"], "at": records.last_write}
        starts = [_build_start(records, StartEvents(first), {})]
    return starts


def _group_events(events: Sequence[Entry]) -> list[StartEvents]:
    groups = list[StartEvents]()
    for event in events:
        if event.get("event") == "start":
            groups.append(StartEvents(event))
        elif groups:
            groups[-1].add(event)
    return groups


def _merge_attempts(lines: Sequence[Entry]) -> list[Entry]:
    """Merge the lines of `attempts.jsonl` about the same start, written at its begin and end."""
    merged = dict[Any, Entry]()
    for position, line in enumerate(lines):
        job = line.get("job_id")
        key = position if job is None else (str(job), line.get("restart_count"))
        merged.setdefault(key, {}).update({k: v for k, v in line.items() if v is not None})
    return [attempt for attempt in merged.values() if _get_begin(attempt) is not None]


def _get_begin(attempt: Entry) -> float | None:
    return to_timestamp(pick(attempt, "start", "time"))


def _belong_together(attempt: Entry, event: Entry) -> bool:
    """Whether a line of `attempts.jsonl` and a `start` event describe the same start."""
    event_job = event.get("slurm_job_id")
    job = attempt.get("job_id")
    if event_job is not None and job is not None:
        restart = to_number(attempt.get("restart_count"))
        return str(event_job) == str(job) and to_number(event.get("slurm_restart_count")) == restart
    at = event.get("at")
    begin = _get_begin(attempt)
    end = to_timestamp(attempt.get("end"))
    return (
        at is not None
        and begin is not None
        and begin - CLOCK_TOLERANCE_S <= at
        and (end is None or at <= end + CLOCK_TOLERANCE_S)
    )


def _build_start(records: RunRecords, events: StartEvents, attempt: Entry) -> Start:
    first = events.start
    last = events.end or {}
    begin = _get_begin(attempt)
    recorded = first.get("at") or (events.events[0].get("at") if events.events else None)
    if recorded is None and begin is None:
        recorded = records.last_write or records.now
    end = to_timestamp(attempt.get("end"))
    if end is None:
        end = last.get("at")
    count, names = _get_nodes(attempt)
    samples = last.get("offending_samples") or attempt.get("offending_samples") or ()
    restart = pick(attempt, "restart_count")
    restart = first.get("slurm_restart_count") if restart is None else restart
    repeats = None
    if "lost_steps" in first:
        repeats = (int(to_number(first["lost_steps"])), to_number(first.get("lost_seconds")))
    return Start(
        number=0,
        begin=begin if begin is not None else float(recorded or 0.0),
        end=end if end is not None else float("nan"),
        begin_known=begin is not None,
        end_known=end is not None,
        world_size=int(to_number(first.get("world_size"))) or int(to_number(attempt.get("ranks"))),
        status=str(last.get("status") or _get_final_status(attempt)),
        reason=str(last.get("reason") or attempt.get("reason") or ""),
        nodes=count or pick(first, "nodes", "slurm_nodes"),
        node_list=names or str(first.get("slurm_node_list") or ""),
        job=str(attempt.get("job_id") or first.get("slurm_job_id") or ""),
        restart=None if restart is None else int(to_number(restart)),
        device=str(first.get("device") or ""),
        device_name=str(first.get("device_name") or ""),
        first_step=first.get("first_step"),
        steps_done=last.get("steps_done") if last else attempt.get("steps_done"),
        failed_step=last.get("failed_step"),
        offending_samples=[str(sample) for sample in samples],
        responsible_host=str(last.get("responsible_host") or ""),
        startup_seconds=dict(events.startup_seconds),
        trained_at=first.get("at"),
        checkpoints=[e for e in events.events if e.get("event") == "checkpoint"],
        rollbacks=[e for e in events.events if e.get("event") == "rollback"],
        repeats=repeats,
    )


def _get_nodes(attempt: Entry) -> tuple[int | None, str]:
    """Number of nodes (None: unknown) and their names with commas between them."""
    nodes = attempt.get("nodes")
    if isinstance(nodes, str):
        return None, nodes
    if isinstance(nodes, list):
        return len(nodes), ",".join(map(str, nodes))
    return (nodes if isinstance(nodes, int) else None), ""


def _get_final_status(attempt: Entry) -> str:
    """How the job script says that the start ended; "" if it does not."""
    status = str(attempt.get("status") or "")
    return "" if status == "running" else status
