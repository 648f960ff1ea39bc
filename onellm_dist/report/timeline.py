"""The starts of a run on a time axis, as SVG, and the colours of the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from onellm_dist.common.counts import format_count
from onellm_dist.common.html.charts import choose_ticks, draw_legend
from onellm_dist.report.starts import Start
from onellm_dist.report.time_account import split_seconds

PART_COLOURS = {
    "progress": "#4477aa",
    "data_wait": "#66ccee",
    "lost": "#ee6677",
    "skipped": "#aa3377",
    "start_up": "#ccbb44",
    "checkpoints": "#228833",
    "validation": "#009988",
    "failed": "#5b6470",
    "other": "#b4bac2",
}
_UNITS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))
_LEFT = 24
_TOP = 16
_BOTTOM = 26


def draw_timeline(starts: Sequence[Start], *, width: int = 960, height: int = 150) -> str:
    """Each start as a block on a time axis, coloured by what its time went into.

    The height of a block is its number of ranks; between blocks the run waited for nodes.
    """
    begin = min(s.begin for s in starts)
    duration = max(s.end for s in starts) - begin
    if duration <= 0:
        return '<p class="none">nothing was recorded</p>'
    scale = (width - 2 * _LEFT) / duration
    ground = height - _BOTTOM
    tallest = max(s.world_size for s in starts)
    out = [
        f'<svg viewBox="0 0 {width} {height}" role="img" '
        'aria-label="the starts of the run on a time axis">'
    ]
    size, unit = next(((s, u) for s, u in _UNITS if duration >= 2 * s), _UNITS[-1])
    for tick in choose_ticks(0.0, duration / size, 8):
        x = _LEFT + tick * size * scale
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{ground}"/>')
        out.append(
            f'<text x="{x:.1f}" y="{height - 10}" text-anchor="middle">{tick:g} {unit}</text>'
        )
    for start in starts:
        x = _LEFT + (start.begin - begin) * scale
        out += _draw_block(start, x, scale, ground, (ground - _TOP) * start.world_size / tallest)
    return "".join(out) + "</svg>" + _draw_legend(starts, duration)


def _draw_legend(starts: Sequence[Start], duration: float) -> str:
    shown = {"start-up": PART_COLOURS["start_up"], "progress": PART_COLOURS["progress"]}
    if any(s.lost_seconds for s in starts):
        shown["lost steps"] = PART_COLOURS["lost"]
    if any(split_seconds(s)["failed"] > 0.01 * duration for s in starts):
        shown["failed, not ended yet"] = PART_COLOURS["failed"]
    if any(split_seconds(s)["other"] > 0.02 * duration for s in starts):
        shown["everything else"] = PART_COLOURS["other"]
    return draw_legend(list(shown), shown)


def _draw_block(start: Start, x: float, scale: float, ground: float, height: float) -> list[str]:
    parts = split_seconds(start)
    progress = sum(
        parts[name] for name in ("progress", "data_wait", "skipped", "checkpoints", "validation")
    )
    drawn = {
        "start_up": parts["start_up"],
        "progress": progress,
        "lost": parts["lost"],
        "failed": parts["failed"],
        "other": parts["other"],
    }
    total = sum(drawn.values())
    # Clocks may differ: the block keeps the length of the start.
    fit = start.seconds / total if total > 0 else 0.0
    out = ["<g>", f"<title>{escape(_describe_start(start))}</title>"]
    here = x
    for name, seconds in drawn.items():
        width = seconds * fit * scale
        if width > 0:
            out.append(
                f'<rect x="{here:.2f}" y="{ground - height:.1f}" width="{width:.2f}" '
                f'height="{height:.1f}" fill="{PART_COLOURS[name]}"/>'
            )
            here += width
    if here - x > 14:
        out.append(
            f'<text x="{(x + here) / 2:.1f}" y="{ground - height - 4:.1f}" '
            f'text-anchor="middle">{start.number}</text>'
        )
    return [*out, "</g>"]


def _describe_start(start: Start) -> str:
    nodes = f", nodes {start.node_list or start.nodes}" if start.nodes else ""
    ranks = format_count(start.world_size, "rank")
    return f"start {start.number}: {ranks}{nodes}; {start.status}: {start.reason}"
