"""Tables of what went wrong in a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.html.page import build_html_table
from onellm_dist.report.entries import to_number
from onellm_dist.report.facts import RunFacts
from onellm_dist.report.incidents import SLOW_FACTOR, Incidents, describe_event
from onellm_dist.report.starts import get_stall_seconds
from onellm_dist.report.wording import format_duration

SHOWN_ROWS = 12
"""Rows of a table; the files have all of them."""


@dataclass(frozen=True)
class IncidentTable:
    """One table of the section."""

    short: str
    """What the table lists, for the sentence that names what was not recorded."""
    title: str
    head: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    order: str
    """How the rows are sorted."""


def draw_incidents(facts: RunFacts) -> Iterator[str]:
    """Everything that went wrong, each kind in a table of its own."""
    incidents = facts.incidents
    absent = list[str]()
    if incidents.checkpoints:
        yield "<h3>Checkpoints</h3>"
        yield f"<p>{escape(_describe_checkpoints(incidents))}</p>"
    else:
        absent.append("checkpoints")
    for table in _build_tables(incidents):
        if not table.rows:
            absent.append(table.short)
            continue
        more = ""
        if len(table.rows) > SHOWN_ROWS:
            more = f" ({SHOWN_ROWS} of {len(table.rows):,}, {table.order})"
        yield f"<h3>{escape(table.title)}{more}</h3>"
        yield f'<div class="narrow">{build_html_table(table.head, table.rows[:SHOWN_ROWS])}</div>'
    if absent:
        yield f'<p class="small">None recorded: {escape(", ".join(absent))}.</p>'
    if facts.records.moved_aside:
        folders = escape(", ".join(facts.records.moved_aside))
        yield (
            '<p class="small">Files of earlier starts that no later start resumed from are in '
            f"{folders}.</p>"
        )


def _describe_checkpoints(incidents: Incidents) -> str:
    checkpoints = incidents.checkpoints
    longest = checkpoints[0]
    total = sum(to_number(c.get("seconds")) for c in checkpoints)
    text = (
        f"{len(checkpoints)} written in {format_duration(total)}: median "
        f"{incidents.checkpoint_median:.3g} s, longest {to_number(longest.get('seconds')):.3g} s "
        f"(after {format_count(int(to_number(longest.get('steps_done'))), 'step')})."
    )
    if any("stall_seconds" in c for c in checkpoints):
        stalls = [get_stall_seconds(c) for c in checkpoints]
        text += (
            f" Training paused for {format_duration(sum(stalls))} of this time, for at most "
            f"{max(stalls):.3g} s."
        )
    if incidents.grace_period is not None:
        late = len(incidents.late_checkpoints)
        text += f" The grace period is {format_duration(incidents.grace_period)}: " + (
            f"{late} took longer." if late else "every checkpoint fits into it."
        )
    return text


def _build_tables(incidents: Incidents) -> list[IncidentTable]:
    return [
        IncidentTable(
            "slow steps",
            f"Steps slower than {SLOW_FACTOR:g} medians ({incidents.typical_seconds:.3g} s)",
            ("step", "start", "seconds", "medians", "waiting for data"),
            [
                (s.step, s.start, f"{s.seconds:.3g}", f"{s.times:.1f}", f"{s.waited:.0%}")
                for s in incidents.slow_steps
            ],
            "by seconds",
        ),
        IncidentTable(
            "skipped steps",
            "Skipped steps",
            ("step", "time", "why"),
            [
                (
                    e.get("step", "?"),
                    e.get("time", ""),
                    describe_event({k: v for k, v in e.items() if k != "step"}),
                )
                for e in reversed(incidents.skipped_steps)
            ],
            "newest first",
        ),
        IncidentTable(
            "gradient spikes",
            "Gradient spikes",
            ("step", "norm", "median before"),
            [
                (spike.step, f"{spike.norm:.4g}", f"{spike.median_before:.4g}")
                for spike in sorted(incidents.gradient_spikes, key=lambda spike: -spike.norm)
            ],
            "by norm",
        ),
        IncidentTable(
            "unreadable samples",
            "Skipped samples (could not be read)",
            ("step", "sample", "why"),
            [
                (e.get("step", "?"), e.get("sample_id", "?"), e.get("reason", ""))
                for e in reversed(incidents.skipped_samples)
            ],
            "newest first",
        ),
        IncidentTable(
            "hangs, rollbacks or warnings",
            "Other events",
            ("time", "event", "what"),
            [
                (e.get("time", ""), e.get("event", "?"), describe_event(e))
                for e in reversed(incidents.other_events)
            ],
            "newest first",
        ),
    ]
