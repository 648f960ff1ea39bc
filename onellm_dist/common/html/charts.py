"""Line charts, stacked bars and heat maps as inline SVG, for light and dark screens.

They are drawn by hand because a report must work as one file, without a library, a script or a
network.
"""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733", "#009988")
"""Paul Tol's colour-blind safe colours; a modality has the same colour on the whole page."""

Point = tuple[float, float]
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 14, 14, 34
"""Margins of a line chart, in pixels."""
_NOTHING = '<p class="none">nothing was recorded</p>'


def choose_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return about `wanted` round numbers that span [low, high]."""
    if high <= low:
        return [low]
    raw = (high - low) / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def format_short(value: float) -> str:
    """Format a round number for an axis: 150000 becomes 150k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size > 1e3):
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Return the trailing mean over `window` values (fewer at the start)."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        out.append(total / min(i + 1, window))
    return out


def thin(points: Sequence[Point], most: int = 400) -> list[Point]:
    """Return at most `most` points, evenly spaced, including the last one."""
    if len(points) <= most:
        return list(points)
    stride = len(points) / most
    return [points[int(i * stride)] for i in range(most - 1)] + [points[-1]]


def keep_extremes(points: Sequence[Point], most: int = 800) -> list[Point]:
    """Return at most `most` points without losing a spike.

    They are the lowest and the highest point of each stretch, and the last one.
    """
    if len(points) <= most:
        return list(points)
    length = -(-2 * len(points) // (most - 1))
    kept = list[Point]()
    for i in range(0, len(points), length):
        stretch = points[i : i + length]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


@dataclass(frozen=True)
class _Axes:
    """The area of a line chart, from data to pixels."""

    x0: float
    x1: float
    y0: float
    y1: float
    width: int
    height: int

    def to_x(self, x: float) -> float:
        """Return the pixel of an x value."""
        return _LEFT + (x - self.x0) / (self.x1 - self.x0) * (self.width - _LEFT - _RIGHT)

    def to_y(self, y: float) -> float:
        """Return the pixel of a y value; values above the axis are drawn at its edge."""
        share = (min(y, self.y1) - self.y0) / (self.y1 - self.y0)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)


def draw_line_chart(
    series: Mapping[str, Sequence[Point]],
    *,
    x_label: str,
    y_label: str,
    colours: Mapping[str, str] | None = None,
    marks: Mapping[float, str] | None = None,
    pale: Collection[str] = (),
    dots: Collection[str] = (),
    ceiling: float | None = None,
    from_zero: bool = True,
    width: int = 640,
    height: int = 260,
) -> str:
    """Draw a line chart with one line per series.

    Args:
        series: name to (x, y) points.
        x_label: label of the x axis.
        y_label: label of the y axis.
        colours: name to colour; default: PALETTE in order.
        marks: x to the label of a vertical line there.
        pale: series drawn thin behind the others, with every spike and without a legend entry.
        dots: series whose points are marked.
        ceiling: maximum of the y axis; values above are drawn at the edge.
        from_zero: whether the y axis includes 0.
        width: width of the drawing, in pixels.
        height: height of the drawing, in pixels.

    Returns:
        The SVG element, followed by its legend.
    """
    points = [p for line in series.values() for p in line]
    if not points:
        return _NOTHING
    axes = _build_axes(points, ceiling, from_zero=from_zero, width=width, height=height)
    chosen = _choose_colours(list(series), colours)
    label = f"{html.escape(y_label)} by {html.escape(x_label)}"
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">',
        *_draw_grid(axes),
        *_draw_marks(axes, marks or {}),
    ]
    for name in sorted(series, key=lambda name: name not in pale):
        parts += _draw_line(
            axes, name, series[name], chosen[name], pale=name in pale, dots=name in dots
        )
    parts.append(
        f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">{html.escape(x_label)}</text>'
        f'<text transform="rotate(-90)" x="{-height / 2}" y="12" text-anchor="middle">'
        f"{html.escape(y_label)}</text></svg>"
    )
    return "".join(parts) + draw_legend([name for name in series if name not in pale], chosen)


def _build_axes(
    points: Sequence[Point], ceiling: float | None, *, from_zero: bool, width: int, height: int
) -> _Axes:
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    lowest, highest = min(p[1] for p in points), max(p[1] for p in points)
    highest = highest if ceiling is None else max(lowest, min(highest, ceiling))
    margin = 0.05 * ((highest - lowest) or abs(highest) or 1.0)
    y0, y1 = (
        (min(0.0, lowest), highest + 0.05 * abs(highest) or 1.0)
        if from_zero
        else (lowest - margin, highest + margin)
    )
    return _Axes(x0, x1 if x1 > x0 else x0 + 1, y0, y1, width, height)


def _choose_colours(names: Sequence[str], colours: Mapping[str, str] | None) -> dict[str, str]:
    return {n: (colours or {}).get(n, PALETTE[i % len(PALETTE)]) for i, n in enumerate(names)}


def _draw_grid(axes: _Axes) -> Iterator[str]:
    right, bottom = axes.width - _RIGHT, axes.height - _BOTTOM
    for tick in choose_ticks(axes.y0, axes.y1):
        y = axes.to_y(tick)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        text = format_short(tick)
        yield f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    for tick in choose_ticks(axes.x0, axes.x1):
        x, text = axes.to_x(tick), format_short(tick)
        yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{text}</text>'


def _draw_marks(axes: _Axes, marks: Mapping[float, str]) -> Iterator[str]:
    for position, label in marks.items():
        x, bottom = axes.to_x(position), axes.height - _BOTTOM
        yield f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
        yield f'<text x="{x + 4:.1f}" y="{_TOP + 10}">{html.escape(label)}</text>'


def _draw_line(
    axes: _Axes, name: str, points: Sequence[Point], colour: str, *, pale: bool, dots: bool
) -> Iterator[str]:
    line = keep_extremes(points) if pale else thin(points)
    path = " ".join(f"{axes.to_x(x):.1f},{axes.to_y(y):.1f}" for x, y in line)
    stroke = 'stroke-width="1" stroke-opacity="0.35"' if pale else 'stroke-width="1.6"'
    title = f"<title>{html.escape(name)}</title>"
    yield f'<polyline fill="none" stroke="{colour}" {stroke} points="{path}">{title}</polyline>'
    if dots or len(line) == 1:
        for x, y in line:
            centre = f'cx="{axes.to_x(x):.1f}" cy="{axes.to_y(y):.1f}"'
            yield f'<circle {centre} r="2.4" fill="{colour}">{title}</circle>'


def draw_legend(names: Sequence[str], colours: Mapping[str, str] | None = None) -> str:
    """Draw the legend of a chart; empty for a single line.

    Args:
        names: names of the lines.
        colours: name to colour; default: PALETTE in order.
    """
    if len(names) < 2:
        return ""
    entries = [
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
        for name, colour in _choose_colours(names, colours).items()
    ]
    return f'<p class="legend">{"".join(entries)}</p>'


_BAR_LEFT, _BAR_HEIGHT, _BAR_GAP, _BAR_WIDTH = 150, 18, 8, 960


def draw_stacked_bars(
    rows: Sequence[tuple[str, Mapping[str, float]]],
    colours: Mapping[str, str],
    *,
    unit: str,
    keys: Mapping[str, str] | None = None,
) -> str:
    """Draw horizontal bars, one per row, each made of parts in a fixed order and colour.

    Args:
        rows: (label, part to length in `unit`).
        colours: part to colour, in the order of the parts.
        unit: unit of the lengths.
        keys: part to its name in the legend; default: the part itself.

    Returns:
        The SVG element, followed by its legend.
    """
    longest = max((sum(parts.values()) for _, parts in rows), default=0.0)
    if longest <= 0:
        return _NOTHING
    height = len(rows) * (_BAR_HEIGHT + _BAR_GAP) + 26
    scale = (_BAR_WIDTH - _BAR_LEFT - 110) / longest
    unit = html.escape(unit)
    names = {part: (keys or {}).get(part, part) for part in colours}
    label = f"stacked bars in {unit}"
    out = [f'<svg viewBox="0 0 {_BAR_WIDTH} {height}" role="img" aria-label="{label}">']
    for tick in choose_ticks(0.0, longest):
        x = _BAR_LEFT + tick * scale
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 22}"/>')
        out.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{tick:g}</text>')
    for i, (row, parts) in enumerate(rows):
        y = i * (_BAR_HEIGHT + _BAR_GAP) + 4
        out += _draw_bar(row, parts, y, scale, unit, colours, names)
    shown = {
        names[part]: colour
        for part, colour in colours.items()
        if any(parts.get(part, 0.0) > 0 for _, parts in rows)
    }
    return "".join(out) + "</svg>" + draw_legend(list(shown), shown)


def _draw_bar(
    row: str,
    parts: Mapping[str, float],
    y: int,
    scale: float,
    unit: str,
    colours: Mapping[str, str],
    names: Mapping[str, str],
) -> Iterator[str]:
    x, base = float(_BAR_LEFT), y + _BAR_HEIGHT - 5
    yield f'<text x="{_BAR_LEFT - 8}" y="{base}" text-anchor="end">{html.escape(row)}</text>'
    for part, colour in colours.items():
        value = parts.get(part, 0.0)
        if value > 0:
            title = f"<title>{html.escape(names[part])}: {value:.3g} {unit}</title>"
            box = f'x="{x:.1f}" y="{y}" width="{max(0.5, value * scale):.1f}"'
            yield f'<rect {box} height="{_BAR_HEIGHT}" fill="{colour}">{title}</rect>'
            x += value * scale
    yield f'<text x="{x + 6:.1f}" y="{base}">{sum(parts.values()):.3g} {unit}</text>'


def draw_router_chart(weights: Mapping[str, Sequence[Sequence[float]]], *, cell: int = 14) -> str:
    """Draw router weights as a heat map: experts as rows per modality, queries as columns.

    The mean over the queries stands at the right of each row.

    Args:
        weights: modality to [Q][E], each row summing to 1.
        cell: size of a cell, in pixels.
    """
    if not weights:
        return '<p class="none">no router weights were recorded</p>'
    queries, experts = len(next(iter(weights.values()))), len(next(iter(weights.values()))[0])
    left, gap = 96, 10
    width, height = left + queries * cell + 70, len(weights) * (experts * cell + gap) + 20
    values = [w for rows in weights.values() for row in rows for w in row]
    low, high = min(values), max(values)
    label = "router weight by modality, expert and query"
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">']
    for m, (name, rows) in enumerate(weights.items()):
        top = m * (experts * cell + gap) + 4
        middle = top + experts * cell / 2 + 4
        parts.append(
            f'<text x="{left - 30}" y="{middle}" text-anchor="end">{html.escape(name)}</text>'
        )
        for e in range(experts):
            expert = [row[e] for row in rows]
            parts += _draw_expert(name, e, expert, (low, high), left, top + e * cell, cell)
    axis = f"query (mean over queries at the right; weights from {low:.2f} to {high:.2f})"
    centre = left + queries * cell / 2
    parts.append(f'<text x="{centre}" y="{height - 4}" text-anchor="middle">{axis}</text></svg>')
    return "".join(parts)


def _draw_expert(
    modality: str,
    expert: int,
    weights: Sequence[float],
    limits: tuple[float, float],
    left: int,
    y: int,
    cell: int,
) -> Iterator[str]:
    """Draw one row of the heat map: an expert's weight for every query."""
    low, high = limits
    base = y + cell - 3
    yield f'<text x="{left - 6}" y="{base}" text-anchor="end">e{expert + 1}</text>'
    for q, weight in enumerate(weights):
        share = (weight - low) / (high - low) if high > low else 0.5
        about = f"{html.escape(modality)}, expert {expert + 1}, query {q + 1}: {weight:.3f}"
        fill = f'fill="#4477aa" fill-opacity="{0.08 + 0.92 * share:.3f}"'
        box = f'x="{left + q * cell}" y="{y}" width="{cell - 1}" height="{cell - 1}"'
        yield f"<rect {box} {fill}><title>{about}</title></rect>"
    mean = sum(weights) / len(weights)
    yield f'<text x="{left + len(weights) * cell + 8}" y="{base}">{mean:.3f}</text>'
