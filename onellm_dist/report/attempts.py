"""The starts of a run, put together from the job script's record, the run's events and its step lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from onellm_dist.report.read import Entry, RunFiles, seconds_since_1970

PHASES = (
    "scheduler",
    "job",
    "imports",
    "process_group",
    "model",
    "engine",
    "checkpoint",
    "data",
    "first_step",
)
"""From the end of the start before to the first new step. `scheduler` is the wait for nodes, `job` what the job script does
before Python begins (preflight, container, launcher); the rest is told by the run."""
QUIET_S = 900.0
"""Where the file system has no locks, a run that wrote something in this time is taken to be going."""
SLACK_S = 5.0
"""Clocks of the job script's node and of rank 0 may differ by this much."""


@dataclass
class Attempt:
    """One start: from the moment its nodes were given to it, to the moment they were free again."""

    number: int
    begin: float
    """Seconds since 1970."""
    end: float
    begin_known: bool
    """Told by the job script; otherwise reckoned from the run's own events."""
    end_known: bool
    world: int
    """Ranks; 1 where nothing says it."""
    status: str
    """`running`, `done`, `preempted`, `failed`, `usage`, or `lost` (ended without a word: killed, or its node died)."""
    reason: str
    nodes: int | None = None
    node_list: str = ""
    job: str = ""
    restart: int | None = None
    device: str = ""
    first_step: int | None = None
    """None: it never came as far as training."""
    last_step: int | None = None
    """Steps done at its end."""
    failed_step: int | None = None
    suspects: list[str] = field(default_factory=list)
    suspected_host: str = ""
    """The node that the watchdog blames for a hang."""
    phases: dict[str, float] = field(default_factory=dict)
    trained_at: float | None = None
    """When everything was built and the first step was about to begin."""
    steps: list[Entry] = field(default_factory=list)
    """Its lines of `metrics.jsonl` that stand."""
    redoes: tuple[int, float] | None = None
    """Steps of earlier starts, and their seconds, that this one has to do again by its own word; None: it says nothing."""
    lost_steps: int = 0
    """Steps it had done that a later start, or a roll-back, had to do again."""
    lost_seconds: float = 0.0
    lost_known: bool = True
    """False: the seconds are the count times this run's median step."""
    checkpoints: list[Entry] = field(default_factory=list)
    rollbacks: list[Entry] = field(default_factory=list)
    validation_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Time its nodes were held."""
        return max(0.0, self.end - self.begin)


def attempts_of(files: RunFiles) -> list[Attempt]:
    """Every start of the run in order, those that never came to train among them.

    A start is a `start` event, a line of the job script's `attempts.jsonl`, or both: they belong together where job and restart are the
    same, else where the event lies inside the line's time.
    """
    groups = _groups(files)
    rows = _merged_rows(files)
    taken = set[int]()
    found = list[Attempt]()
    for group in groups:
        index = next(
            (i for i, row in enumerate(rows) if i not in taken and _same(row, group)), None
        )
        if index is not None:
            taken.add(index)
        found.append(_attempt(files, group, rows[index] if index is not None else None))
    found += [_attempt(files, _Group({}), row) for i, row in enumerate(rows) if i not in taken]
    found.sort(key=lambda a: a.begin)
    if not found and files.steps:  # the events are gone, the steps are there
        found = [
            _attempt(
                files, _Group({"first_step": files.steps[0]["step"], "at": files.last_sign}), None
            )
        ]
    _worlds(found)
    _give_steps(files, found)
    for attempt in found:
        if not attempt.begin_known:
            attempt.begin -= _inside(attempt)
    _lost(files, found)
    _ends(files, found)
    for index, attempt in enumerate(found):
        attempt.number = index + 1
        _outer_phases(attempt, found[index - 1] if index else None)
    return found


def _worlds(found: list[Attempt]) -> None:
    """A start that never came to train says no ranks, nor did job scripts of an older version: it had as many a node as another start."""
    a_node = next((a.world / a.nodes for a in found if a.world and a.nodes), 1.0)
    for attempt in found:
        attempt.world = attempt.world or max(1, round((attempt.nodes or 1) * a_node))


@dataclass
class _Group:
    """What the run itself wrote in one start."""

    start: Entry
    phases: dict[str, float] = field(default_factory=dict)
    end: Entry | None = None
    events: list[Entry] = field(default_factory=list)

    def give(self, event: Entry) -> None:
        name = event.get("event")
        self.events.append(event)
        if name == "phase":
            key = str(event.get("name"))
            self.phases[key] = self.phases.get(key, 0.0) + number(event.get("seconds"))
        elif name == "end":
            self.end = event


def _groups(files: RunFiles) -> list[_Group]:
    groups = list[_Group]()
    for event in files.events:
        if event.get("event") == "start":
            groups.append(_Group(event))
        elif groups:
            groups[-1].give(event)
    return groups


def _outer_phases(attempt: Attempt, before: Attempt | None) -> None:
    """The phases that the run itself cannot see: the wait for nodes, and the job script before Python."""
    outer = dict[str, float]()
    if before is not None and (before.end_known or attempt.begin_known):
        outer["scheduler"] = max(0.0, attempt.begin - before.end)
    if attempt.begin_known and attempt.trained_at is not None and attempt.phases:
        outer["job"] = max(0.0, attempt.trained_at - attempt.begin - _inside(attempt))
    attempt.phases = {**outer, **attempt.phases}


def _inside(attempt: Attempt) -> float:
    """Seconds from the beginning of rank 0's process to the first step: phases without the wait for that step's data."""
    waited = (
        number(attempt.steps[0].get("seconds")) * number(attempt.steps[0].get("data_wait_fraction"))
        if attempt.steps
        else 0.0
    )
    return max(
        0.0,
        sum(seconds for name, seconds in attempt.phases.items() if name != "first_step") - waited,
    )


def _merged_rows(files: RunFiles) -> list[Entry]:
    """Lines of `attempts.jsonl`, those of one job and restart put together: one may come at the start and one at the end."""
    merged = dict[Any, Entry]()
    for place, line in enumerate(files.attempts):
        job = pick(line, "job_id", "job", "slurm_job_id")
        key = (
            (str(job), pick(line, "restart_count", "restart", "slurm_restart_count"))
            if job is not None
            else place
        )
        merged.setdefault(key, {}).update({k: v for k, v in line.items() if v is not None})
    return [
        row
        for row in merged.values()
        if seconds_since_1970(pick(row, "start", "begin", "time")) is not None
    ]


def _same(row: Entry, group: _Group) -> bool:
    job = group.start.get("slurm_job_id")
    row_job = pick(row, "job_id", "job", "slurm_job_id")
    if job is not None and row_job is not None:
        restart = number(pick(row, "restart_count", "restart", "slurm_restart_count"))
        return (
            str(job) == str(row_job) and number(group.start.get("slurm_restart_count")) == restart
        )
    at, begin = group.start.get("at"), seconds_since_1970(pick(row, "start", "begin", "time"))
    end = seconds_since_1970(row.get("end"))
    return (
        at is not None
        and begin is not None
        and begin - SLACK_S <= at
        and (end is None or at <= end + SLACK_S)
    )


def _attempt(files: RunFiles, group: _Group, row: Entry | None) -> Attempt:
    start, row = group.start, row or {}
    begin = seconds_since_1970(pick(row, "start", "begin", "time"))
    told = start.get("at") or (group.events[0].get("at") if group.events else None)
    if told is None and begin is None:
        told = files.last_sign or files.now
    end = seconds_since_1970(row.get("end"))
    end_event = group.end or {}
    if end is None:
        end = end_event.get("at")
    nodes = pick(row, "nodes", "node_list", "slurm_node_list") if row else None
    names = (
        nodes
        if isinstance(nodes, str)
        else ",".join(map(str, nodes))
        if isinstance(nodes, list)
        else ""
    )
    count = len(nodes) if isinstance(nodes, list) else nodes if isinstance(nodes, int) else None
    return Attempt(
        number=0,
        begin=begin if begin is not None else float(told or 0.0),
        end=end if end is not None else float("nan"),
        begin_known=begin is not None,
        end_known=end is not None,
        world=int(number(start.get("world"))) or int(number(row.get("ranks"))),
        status=str(end_event.get("status") or _over(row)),
        reason=str(end_event.get("reason") or row.get("reason") or ""),
        nodes=count or pick(start, "nodes", "slurm_nodes") or pick(row, "node_count", "num_nodes"),
        node_list=names or str(start.get("slurm_node_list") or start.get("node_list") or ""),
        job=str(pick(row, "job_id", "job", "slurm_job_id") or start.get("slurm_job_id") or ""),
        restart=_restart(row, start),
        device=str(start.get("device") or ""),
        first_step=start.get("first_step"),
        last_step=pick(end_event, "steps_done") if end_event else row.get("steps_done"),
        failed_step=end_event.get("failed_step"),
        suspects=[
            str(s) for s in end_event.get("offending_samples") or row.get("offending_samples") or ()
        ],
        suspected_host=str(end_event.get("suspected_host") or ""),
        phases=dict(group.phases),
        trained_at=start.get("at"),
        checkpoints=[e for e in group.events if e.get("event") == "checkpoint"],
        rollbacks=[e for e in group.events if e.get("event") == "rollback"],
        redoes=(int(number(start["lost_steps"])), number(start.get("lost_seconds")))
        if "lost_steps" in start
        else None,
    )


def _over(row: Entry) -> str:
    """How the job script says that it ended; "" where it does not."""
    status = str(row.get("status") or "")
    return "" if status == "running" else status


def _restart(row: Entry, start: Entry) -> int | None:
    found = pick(row, "restart_count", "restart", "slurm_restart_count")
    found = start.get("slurm_restart_count") if found is None else found
    return None if found is None else int(number(found))


def _give_steps(files: RunFiles, found: list[Attempt]) -> None:
    """A line that stands is of the last start that began at its step or before: later ones would have done it again."""
    trained = [a for a in found if a.first_step is not None]
    for line in files.steps:
        owner = next(
            (a for a in reversed(trained) if (a.first_step or 0) <= line["step"]),
            trained[0] if trained else None,
        )
        if owner is not None:
            owner.steps.append(line)
    for line in files.validation:
        owner = next(
            (a for a in reversed(trained) if (a.first_step or 0) < number(line.get("step"))), None
        )
        if owner is not None:
            owner.validation_seconds += number(line.get("seconds"))


def _lost(files: RunFiles, found: list[Attempt]) -> None:
    """What each start did in vain: the start after it says so (`lost_steps`), else the job script's last step does."""
    trained = [a for a in found if a.first_step is not None]
    seconds = median([number(s.get("seconds")) for s in files.steps])
    for i, after in enumerate(trained[1:], 1):
        before, first = trained[i - 1], after.first_step or 0
        if after.redoes is not None:
            _share_lost(trained[:i], first, *after.redoes)
        elif before.last_step is not None and before.last_step > first:
            before.lost_steps += before.last_step - first
            before.lost_seconds += (before.last_step - first) * seconds
            before.lost_known = False
    for line in files.overwritten:
        owner = next((a for a in reversed(trained) if (a.first_step or 0) <= line["step"]), None)
        if owner is not None:
            owner.lost_steps += 1
            owner.lost_seconds += number(line.get("seconds"))
    for attempt in trained:
        for event in (
            attempt.rollbacks if not files.overwritten else ()
        ):  # their lines are gone from the file: the event counts them
            steps = int(number(event.get("lost_steps")))
            attempt.lost_steps += steps
            attempt.lost_seconds += (
                number(event["lost_seconds"]) if "lost_seconds" in event else steps * seconds
            )
            attempt.lost_known = attempt.lost_known and "lost_seconds" in event


def _share_lost(earlier: list[Attempt], first: int, steps: int, seconds: float) -> None:
    """Lost steps belong to the start before, as far as it did them; one that came back further takes from those before it too."""
    left = steps
    for attempt in reversed(earlier):
        if left <= 0:
            return
        done = max(0, first + left - max(first, attempt.first_step or 0))
        own = left if attempt is earlier[0] else min(left, done)
        attempt.lost_steps += own
        attempt.lost_seconds += seconds * own / steps
        left -= own


def _ends(files: RunFiles, found: list[Attempt]) -> None:
    """Where nobody recorded an end: when the start was last seen alive, and what became of it."""
    for i, attempt in enumerate(found):
        last = i == len(found) - 1
        written = (
            (attempt.trained_at or attempt.begin)
            + attempt.lost_seconds
            + attempt.validation_seconds
        )
        written += sum(number(s.get("seconds")) for s in attempt.steps)
        written += sum(stall(c) for c in attempt.checkpoints)
        seen = max([written, *[c["at"] for c in attempt.checkpoints if c["at"] is not None]])
        if last and not attempt.end_known:
            _last_end(files, attempt, seen)
        elif not attempt.end_known:
            attempt.end = max(attempt.begin, min(seen, found[i + 1].begin))
        if not attempt.status:
            attempt.status = "lost"
        if attempt.status == "lost":
            attempt.reason = attempt.reason or "no end was recorded: killed, or its node died"
        attempt.end = max(attempt.begin, attempt.end)
        if attempt.last_step is None and attempt.first_step is not None:
            attempt.last_step = (
                attempt.steps[-1]["step"] + 1 if attempt.steps else attempt.first_step
            ) + attempt.lost_steps


def _last_end(files: RunFiles, attempt: Attempt, seen: float) -> None:
    """The newest start: it may be going still; `exit.json` speaks of it."""
    if files.exit is not None and (files.exit.get("at") or 0.0) >= attempt.begin - SLACK_S:
        attempt.status = attempt.status or str(files.exit.get("status") or "")
        attempt.reason = attempt.reason or str(files.exit.get("reason") or "")
        attempt.end = files.exit.get("at") or seen
        attempt.last_step = (
            files.exit.get("steps_done") if attempt.last_step is None else attempt.last_step
        )
        attempt.failed_step = (
            files.exit.get("failed_step") if attempt.failed_step is None else attempt.failed_step
        )
        attempt.suspects = attempt.suspects or [
            str(s) for s in files.exit.get("offending_samples") or ()
        ]
    elif attempt.status != "lost" and (files.running or _seems_alive(files, attempt)):
        attempt.status, attempt.reason, attempt.end = "running", "", files.now
    else:
        attempt.end = max(seen, files.last_sign or seen)


def _seems_alive(files: RunFiles, attempt: Attempt) -> bool:
    """Without a lock to ask: something was written lately, or the job script began lately and no rank has the directory yet."""
    lately = files.now - max(files.last_sign or 0.0, attempt.begin) < QUIET_S
    return lately and (
        files.running is None or (attempt.begin_known and attempt.first_step is None)
    )


def stall(checkpoint: Entry) -> float:
    """Seconds that training stood still for a checkpoint: less than `seconds` where it is written in the background."""
    return number(pick(checkpoint, "stall_seconds", "seconds"))


def pick(entry: Entry, *keys: str) -> Any:
    """The first of these keys that the entry has a value for, else None."""
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def number(value: Any) -> float:
    """A number, also from text; 0 for anything else (JSON has null for a number that is not finite)."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return 0.0


def median(values: list[float]) -> float:
    """The middle value; 0 of nothing."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
