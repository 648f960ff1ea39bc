"""Line charts, stacked bars and heat maps as inline SVG: no library, no network, light and dark screens."""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Mapping, Sequence

PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee7733", "#009988")
"""Paul Tol's colour-blind safe colours; a modality keeps its colour through the whole page."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 14, 14, 34


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that span [low, high], about `wanted` of them."""
    if high <= low:
        return [low]
    raw = (high - low) / wanted
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def short(value: float) -> str:
    """A round number as an axis shows it: 150000 -> 150k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * size or (abs(value) >= size > 1e3):
            return f"{value / size:g}{letter}"
    return f"{value:g}"


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


def extremes(points: Sequence[tuple[float, float]], most: int = 800) -> list[tuple[float, float]]:
    """At most `most` points: the lowest and the highest of each stretch, so that no spike is lost, and the last one."""
    if len(points) <= most:
        return list(points)
    length = -(-2 * len(points) // (most - 1))
    found = list[tuple[float, float]]()
    for i in range(0, len(points), length):
        stretch = points[i : i + length]
        found += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return found if found[-1] == points[-1] else [*found, points[-1]]


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
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
    """An SVG line chart, a line a series.

    Args:
        marks: labelled vertical lines at an x.
        pale: series drawn thin behind the others, with every spike and without a key.
        dots: series whose points are marked.
        ceiling: the axis ends here at most; what is above is drawn at the edge.
        from_zero: the y axis has 0 in it.
    """
    points = [p for line in series.values() for p in line]
    if not points:
        return '<p class="none">nothing was recorded</p>'
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    lowest, highest = min(p[1] for p in points), max(p[1] for p in points)
    highest = highest if ceiling is None else max(lowest, min(highest, ceiling))
    margin = 0.05 * ((highest - lowest) or abs(highest) or 1.0)
    y0, y1 = (
        (min(0.0, lowest), highest + 0.05 * abs(highest) or 1.0)
        if from_zero
        else (lowest - margin, highest + margin)
    )
    x1 = x1 if x1 > x0 else x0 + 1

    def px(x: float) -> float:
        return _LEFT + (x - x0) / (x1 - x0) * (width - _LEFT - _RIGHT)

    def py(y: float) -> float:
        return height - _BOTTOM - (min(y, y1) - y0) / (y1 - y0) * (height - _TOP - _BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(y_label)} by {html.escape(x_label)}">'
    ]
    for tick in ticks(y0, y1):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{py(tick):.1f}" y2="{py(tick):.1f}"/>'
        )
        parts.append(
            f'<text x="{_LEFT - 6}" y="{py(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>'
        )
    for tick in ticks(x0, x1):
        parts.append(
            f'<text x="{px(tick):.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">{short(tick)}</text>'
        )
    for x, label in (marks or {}).items():
        parts.append(
            f'<line class="mark" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>'
        )
        parts.append(f'<text x="{px(x) + 4:.1f}" y="{_TOP + 10}">{html.escape(label)}</text>')
    chosen = {
        name: (colours or {}).get(name, PALETTE[i % len(PALETTE)]) for i, name in enumerate(series)
    }
    for name in sorted(series, key=lambda name: name not in pale):
        line = extremes(series[name]) if name in pale else thin(series[name])
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line)
        stroke = 'stroke-width="1" stroke-opacity="0.35"' if name in pale else 'stroke-width="1.6"'
        title = f"<title>{html.escape(name)}</title>"
        parts.append(
            f'<polyline fill="none" stroke="{chosen[name]}" {stroke} points="{path}">{title}</polyline>'
        )
        if name in dots or len(line) == 1:
            parts += [
                f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.4" fill="{chosen[name]}">{title}</circle>'
                for x, y in line
            ]
    parts.append(
        f'<text x="{width / 2}" y="{height - 4}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    parts.append(
        f'<text transform="rotate(-90)" x="{-height / 2}" y="12" text-anchor="middle">{html.escape(y_label)}</text></svg>'
    )
    return "".join(parts) + legend([name for name in series if name not in pale], chosen)


def legend(names: Sequence[str], colours: Mapping[str, str] | None = None) -> str:
    """Coloured keys for the lines of a chart; nothing for a single line."""
    if len(names) < 2:
        return ""
    chosen = {
        name: (colours or {}).get(name, PALETTE[i % len(PALETTE)]) for i, name in enumerate(names)
    }
    keys = [
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
        for name, colour in chosen.items()
    ]
    return f'<p class="legend">{"".join(keys)}</p>'


def stacked_bars(
    rows: Sequence[tuple[str, Mapping[str, float]]],
    colours: Mapping[str, str],
    *,
    unit: str,
    keys: Mapping[str, str] | None = None,
) -> str:
    """Horizontal bars, one a row, each made of its parts; a part keeps its place and colour in every bar.

    Args:
        rows: (label, part -> length in `unit`).
        colours: part -> colour, in the order of the parts.
        keys: part -> what the legend says, where that is not its name.
    """
    longest = max((sum(parts.values()) for _, parts in rows), default=0.0)
    if longest <= 0:
        return '<p class="none">nothing was recorded</p>'
    left, bar, gap, width = 150, 18, 8, 960
    height = len(rows) * (bar + gap) + 26
    out = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="stacked bars in {html.escape(unit)}">'
    ]
    scale = (width - left - 110) / longest
    for tick in ticks(0.0, longest):
        x = left + tick * scale
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 22}"/>')
        out.append(f'<text x="{x:.1f}" y="{height - 8}" text-anchor="middle">{tick:g}</text>')
    for i, (label, parts) in enumerate(rows):
        y, x = i * (bar + gap) + 4, float(left)
        out.append(
            f'<text x="{left - 8}" y="{y + bar - 5}" text-anchor="end">{html.escape(label)}</text>'
        )
        for name, colour in colours.items():
            value = parts.get(name, 0.0)
            if value > 0:
                title = f"<title>{html.escape((keys or {}).get(name, name))}: {value:.3g} {html.escape(unit)}</title>"
                out.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{max(0.5, value * scale):.1f}" height="{bar}" fill="{colour}">{title}</rect>'
                )
                x += value * scale
        out.append(
            f'<text x="{x + 6:.1f}" y="{y + bar - 5}">{sum(parts.values()):.3g} {html.escape(unit)}</text>'
        )
    shown = {
        (keys or {}).get(n, n): c
        for n, c in colours.items()
        if any(parts.get(n, 0.0) > 0 for _, parts in rows)
    }
    return "".join(out) + "</svg>" + legend(list(shown), shown)


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
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="routing weight by modality, expert and query">'
    ]
    for m, (name, rows) in enumerate(weights.items()):
        top = m * (experts * cell + gap) + 4
        parts.append(
            f'<text x="{left - 30}" y="{top + experts * cell / 2 + 4}" text-anchor="end">{html.escape(name)}</text>'
        )
        for e in range(experts):
            y = top + e * cell
            parts.append(
                f'<text x="{left - 6}" y="{y + cell - 3}" text-anchor="end">e{e + 1}</text>'
            )
            for q in range(queries):
                share = (rows[q][e] - low) / (high - low) if high > low else 0.5
                x = left + q * cell
                title = f"<title>{html.escape(name)}, expert {e + 1}, query {q + 1}: {rows[q][e]:.3f}</title>"
                fill = f'fill="#4477aa" fill-opacity="{0.08 + 0.92 * share:.3f}"'
                parts.append(
                    f'<rect x="{x}" y="{y}" width="{cell - 1}" height="{cell - 1}" {fill}>{title}</rect>'
                )
            mean = sum(row[e] for row in rows) / queries
            parts.append(
                f'<text x="{left + queries * cell + 8}" y="{y + cell - 3}">{mean:.3f}</text>'
            )
    axis = f"query (mean over queries at the right; weights from {low:.2f} to {high:.2f})"
    parts.append(
        f'<text x="{left + queries * cell / 2}" y="{height - 4}" text-anchor="middle">{axis}</text></svg>'
    )
    return "".join(parts)
