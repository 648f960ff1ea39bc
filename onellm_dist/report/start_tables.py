"""Where the time of a run went: the account, the starts, and their start-up timing."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from html import escape

from onellm_dist.common.html.charts import draw_stacked_bars
from onellm_dist.common.html.page import build_html_table
from onellm_dist.common.progress import format_seconds
from onellm_dist.report.facts import RunFacts
from onellm_dist.report.starts import STARTUP_PARTS, Start, compute_resume_seconds
from onellm_dist.report.summary import RunSummary
from onellm_dist.report.time_account import DEFINITION, LABELS, PARTS
from onellm_dist.report.timeline import PART_COLOURS
from onellm_dist.report.wording import format_time

STARTUP_COLOURS = {
    "scheduler": "#b4bac2",
    "job": "#8b95a1",
    "imports": "#ccbb44",
    "process_group": "#ee7733",
    "model": "#4477aa",
    "engine": "#66ccee",
    "checkpoint": "#228833",
    "data": "#aa3377",
    "first_step": "#009988",
}
STARTUP_LABELS = {
    "scheduler": "scheduler (wait for nodes)",
    "job": "job script, container, launcher",
    "imports": "imports",
    "process_group": "process group",
    "model": "model",
    "engine": "engine",
    "checkpoint": "checkpoint",
    "data": "data",
    "first_step": "first step",
}
SHOWN_STARTS = 40


def draw_time(facts: RunFacts, summary: RunSummary) -> Iterator[str]:
    """Shares of the allocated time, and the goodput with its definition."""
    account = facts.account
    if account.allocated <= 0:
        yield '<p class="none">nothing was recorded</p>'
        return
    share = {name: 100 * seconds / account.allocated for name, seconds in account.parts.items()}
    yield draw_stacked_bars([("allocated time", share)], PART_COLOURS, unit="%", keys=LABELS)
    rows = [
        (LABELS[name], f"{share[name]:.1f}%", _format_hours(account.parts[name]))
        for name in PARTS
        if account.parts[name] > 0
    ]
    rows.append(("allocated", "100.0%", _format_hours(account.allocated)))
    on_gpus = any(s.device.startswith("cuda") for s in facts.starts)
    yield build_html_table(
        ("", "share", "GPU hours" if on_gpus else "rank hours"), rows, right=(1, 2)
    )
    goodput = "–" if summary.goodput is None else f"{summary.goodput:.1%}"
    yield f'<p><b>Goodput {goodput}.</b> <span class="small">{escape(DEFINITION)}</span></p>'
    text = (
        f"Wall-clock time {format_seconds(account.wall)}, of which "
        f"{format_seconds(account.queued)} between starts."
    )
    if account.estimated:
        text += (
            " Some begins and ends were not recorded by a job script (attempts.jsonl) and are "
            "estimated from the run's own events."
        )
    yield f'<p class="small">{escape(text)}</p>'


def draw_starts(starts: Sequence[Start]) -> str:
    """A table with a row for each start."""
    head = (
        "",
        "begin",
        "held",
        "job / requeue",
        "nodes / ranks",
        "steps",
        "lost steps",
        "how it ended",
    )
    return build_html_table(head, [_build_row(s) for s in starts], right=(0, 2, 5, 6), html=(1, 7))


def _build_row(start: Start) -> tuple[object, ...]:
    restart = "" if start.restart is None else f" / {start.restart}"
    steps = "–"
    if start.first_step is not None:
        done = "" if start.steps_done is None else f" {start.steps_done:,}"
        steps = f"{start.first_step:,} →{done}"
    lost = "0"
    if start.lost_steps:
        about = "" if start.lost_known else "≈ "
        lost = f"{about}{start.lost_steps} ({format_seconds(start.lost_seconds)})"
    status = escape(start.status)
    nodes = f'<div class="small">{escape(start.node_list)}</div>' if start.node_list else ""
    return (
        start.number,
        f'<span class="day">{format_time(start.begin)}</span>',
        format_seconds(start.seconds),
        f"{start.job}{restart}" if start.job else "–",
        f"{start.nodes or '–'} / {start.world_size}",
        steps,
        lost,
        f'<span class="badge {status}">{status}</span> {escape(start.reason)}{nodes}',
    )


def draw_startup(starts: Sequence[Start]) -> Iterator[str]:
    """Bars and a table: how long each part of a start-up took."""
    timed = [s for s in starts if set(s.startup_seconds) - {"scheduler"}]
    if not timed:
        yield (
            '<p class="none">The starts recorded no start-up timing (events `startup_timing` in '
            "events.jsonl).</p>"
        )
        return
    shown = timed[-SHOWN_STARTS:]
    bars = [
        (
            f"start {s.number}",
            {name: s.startup_seconds.get(name, 0.0) for name in STARTUP_PARTS[1:]},
        )
        for s in shown
    ]
    yield draw_stacked_bars(bars, STARTUP_COLOURS, unit="s", keys=STARTUP_LABELS)
    names = [STARTUP_LABELS[part].split(" (")[0].split(",")[0] for part in STARTUP_PARTS]
    head = ["start", *names, "all, s"]
    rows = [_build_startup_row(s) for s in shown]
    if len(timed) > 2:
        rows.append(_build_median_row(timed[1:]))
    yield build_html_table(head, rows, right=range(1, len(head)))
    yield (
        '<p class="small">Seconds until the first new step was done. The bars begin when nodes '
        "were allocated; the table includes the wait for them, which begins at the end of the "
        "previous start.</p>"
    )


def _build_startup_row(start: Start) -> list[object]:
    seconds = start.startup_seconds
    parts = [f"{seconds[part]:.1f}" if part in seconds else "–" for part in STARTUP_PARTS]
    return [start.number, *parts, f"{compute_resume_seconds(start):.1f}"]


def _build_median_row(restarts: Sequence[Start]) -> list[object]:
    medians = list[str]()
    for part in STARTUP_PARTS:
        known = [s.startup_seconds[part] for s in restarts if part in s.startup_seconds]
        medians.append(f"{statistics.median(known):.1f}" if known else "–")
    total = statistics.median(compute_resume_seconds(s) or 0.0 for s in restarts)
    return ["median of restarts", *medians, f"{total:.1f}"]


def _format_hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
