"""Pictures of the report: the run on a clock, and its colours."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

from onellm_dist.common.html.charts import legend, ticks
from onellm_dist.report.account import split
from onellm_dist.report.attempts import Attempt

PART_COLOURS = {
    "progress": "#4477aa",
    "data_wait": "#66ccee",
    "lost": "#ee6677",
    "skipped": "#aa3377",
    "start_up": "#ccbb44",
    "checkpoints": "#228833",
    "validation": "#009988",
    "dead": "#5b6470",
    "other": "#b4bac2",
}
PHASE_COLOURS = {
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
PHASE_WORDS = {
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
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def timeline(attempts: Sequence[Attempt], *, width: int = 960, height: int = 150) -> str:
    """The starts on a clock: a block each, as high as its ranks, coloured by what its time went into; gaps are the queue."""
    begin = min(a.begin for a in attempts)
    span = max(a.end for a in attempts) - begin
    if span <= 0:
        return '<p class="none">nothing was recorded</p>'
    tallest, left, bottom, top = max(a.world for a in attempts), 24, 26, 16
    scale, ground = (width - 2 * left) / span, height - bottom
    out = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="the starts of the run on a clock">'
    ]
    size, unit = next(((s, u) for s, u in _UNITS if span >= 2 * s), _UNITS[-1])
    for tick in ticks(0.0, span / size, 8):
        x = left + tick * size * scale
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{ground}"/>')
        out.append(
            f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle">{tick:g} {unit}</text>'
        )
    for attempt in attempts:
        out += _block(
            attempt,
            left + (attempt.begin - begin) * scale,
            scale,
            ground,
            (ground - top) * attempt.world / tallest,
        )
    shown = {"start-up": PART_COLOURS["start_up"], "progress": PART_COLOURS["progress"]}
    if any(a.lost_seconds for a in attempts):
        shown["steps done in vain"] = PART_COLOURS["lost"]
    if any(split(a)["dead"] > 0.01 * span for a in attempts):
        shown["broken, not ended yet"] = PART_COLOURS["dead"]
    if any(split(a)["other"] > 0.02 * span for a in attempts):
        shown["anything else"] = PART_COLOURS["other"]
    return "".join(out) + "</svg>" + legend(list(shown), shown)


def _block(attempt: Attempt, x: float, scale: float, ground: float, tall: float) -> list[str]:
    parts = split(attempt)
    useful = sum(
        parts[name] for name in ("progress", "data_wait", "skipped", "checkpoints", "validation")
    )
    drawn = (
        ("start_up", parts["start_up"]),
        ("progress", useful),
        ("lost", parts["lost"]),
        ("dead", parts["dead"]),
        ("other", parts["other"]),
    )
    whole = sum(seconds for _, seconds in drawn)
    fit = (
        attempt.seconds / whole if whole > 0 else 0.0
    )  # clocks may differ: the block keeps its length
    nodes = f", nodes {attempt.node_list or attempt.nodes}" if attempt.nodes else ""
    title = f"<title>start {attempt.number}: {attempt.world} ranks{escape(nodes)}; {escape(attempt.status)}: {escape(attempt.reason)}</title>"
    out, here = ["<g>", title], x
    for name, seconds in drawn:
        wide = seconds * fit * scale
        if wide > 0:
            out.append(
                f'<rect x="{here:.2f}" y="{ground - tall:.1f}" width="{wide:.2f}" height="{tall:.1f}" fill="{PART_COLOURS[name]}"/>'
            )
            here += wide
    if here - x > 14:
        out.append(
            f'<text x="{(x + here) / 2:.1f}" y="{ground - tall - 4:.1f}" text-anchor="middle">{attempt.number}</text>'
        )
    return [*out, "</g>"]


def clock(seconds: float) -> str:
    """A moment as people read it, in this machine's zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
