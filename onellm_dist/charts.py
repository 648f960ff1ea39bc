"""Line charts, stacked bars and heat maps as inline SVG: no library, no network, light and dark screens."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733", "#009988")
"""Paul Tol's colour-blind safe colours; a modality keeps its colour through the whole page."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 34


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that span [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Trailing mean over `window` values (fewer at the start)."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        out.append(total / min(i + 1, window))
    return out


def thin(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most `most` points, evenly chosen, the last one kept."""
    if len(points) <= most:
        return list(points)
    stride = len(points) / most
    return [points[int(i * stride)] for i in range(most - 1)] + [points[-1]]


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_label: str,
    y_label: str,
    colours: Mapping[str, str] | None = None,
    marks: Mapping[float, str] | None = None,
    width: int = 640,
    height: int = 260,
) -> str:
    """An SVG line chart, a line a series; `marks` are labelled vertical lines at an x."""
    points = [p for line in series.values() for p in line]
    if not points:
        return '<p class="none">nothing was recorded</p>'
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    y0, y1 = min(0.0, *(p[1] for p in points)), max(p[1] for p in points) * 1.05 or 1.0
    x1 = x1 if x1 > x0 else x0 + 1

    def px(x: float) -> float:
        return _LEFT + (x - x0) / (x1 - x0) * (width - _LEFT - _RIGHT)

    def py(y: float) -> float:
        return height - _BOTTOM - (y - y0) / (y1 - y0) * (height - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(y_label)} by {html.escape(x_label)}">']
    for tick in _ticks(y0, y1):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(x0, x1):
        parts.append(f'<text x="{px(tick):.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    for x, label in (marks or {}).items():
        parts.append(f'<line class="mark" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
        parts.append(f'<text x="{px(x) + 4:.1f}" y="{_TOP + 10}">{html.escape(label)}</text>')
    for i, (name, line) in enumerate(series.items()):
        colour = (colours or {}).get(name, PALETTE[i % len(PALETTE)])
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in thin(line))
        parts.append(
            f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{path}"><title>{html.escape(name)}</title></polyline>'
        )
    parts.append(f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(f'<text transform="rotate(-90)" x="{-height / 2}" y="12" text-anchor="middle">{html.escape(y_label)}</text></svg>')
    return "".join(parts) + legend(list(series), colours)


def legend(names: Sequence[str], colours: Mapping[str, str] | None = None) -> str:
    """Coloured keys for the lines of a chart; nothing for a single line."""
    if len(names) < 2:
        return ""
    chosen = {name: (colours or {}).get(name, PALETTE[i % len(PALETTE)]) for i, name in enumerate(names)}
    keys = [f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>' for name, colour in chosen.items()]
    return f'<p class="legend">{"".join(keys)}</p>'


def router_chart(weights: Mapping[str, Sequence[Sequence[float]]], *, cell: int = 14) -> str:
    """Routing weights as a heat map: a row an expert within each modality, a column a query; the mean at the right.

    Args:
        weights: modality -> [Q][E], each row summing to 1.
    """
    if not weights:
        return '<p class="none">no router weights were recorded</p>'
    queries, experts = len(next(iter(weights.values()))), len(next(iter(weights.values()))[0])
    left, gap = 96, 10
    width, height = left + queries * cell + 70, len(weights) * (experts * cell + gap) + 20
    values = [w for rows in weights.values() for row in rows for w in row]
    low, high = min(values), max(values)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="routing weight by modality, expert and query">']
    for m, (name, rows) in enumerate(weights.items()):
        top = m * (experts * cell + gap) + 4
        parts.append(f'<text x="{left - 30}" y="{top + experts * cell / 2 + 4}" text-anchor="end">{html.escape(name)}</text>')
        for e in range(experts):
            y = top + e * cell
            parts.append(f'<text x="{left - 6}" y="{y + cell - 3}" text-anchor="end">e{e + 1}</text>')
            for q in range(queries):
                share = (rows[q][e] - low) / (high - low) if high > low else 0.5
                x = left + q * cell
                title = f"<title>{html.escape(name)}, expert {e + 1}, query {q + 1}: {rows[q][e]:.3f}</title>"
                fill = f'fill="#4477aa" fill-opacity="{0.08 + 0.92 * share:.3f}"'
                parts.append(f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" {fill}>{title}</rect>')
            mean = sum(row[e] for row in rows) / queries
            parts.append(f'<text x="{left + queries * cell + 8}" y="{y + cell - 3}">{mean:.3f}</text>')
    axis = f"query (mean over queries at the right; weights from {low:.2f} to {high:.2f})"
    parts.append(f'<text x="{left + queries * cell / 2}" y="{height - 4}" text-anchor="middle">{axis}</text></svg>')
    return "".join(parts)
