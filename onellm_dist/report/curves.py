"""Curves over the steps: loss, learning rate, gradients, throughput, router load."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from onellm_dist.common.html.charts import draw_line_chart
from onellm_dist.report.entries import Entry, to_number
from onellm_dist.report.facts import RunFacts
from onellm_dist.report.starts import Start

Points = list[tuple[float, float]]
X_LABEL = "steps done"
BLUE = "#4477aa"
RED = "#ee6677"
MOST_RESTARTS = 12
"""More restarts are not drawn: they would hide the curve."""
RATES = (
    ("lr", "Learning rate", "learning rate"),
    ("grad_norm", "Gradient norm, before clipping", "norm"),
    ("tokens_per_second", "Throughput, all ranks", "tokens/s"),
    ("data_wait_fraction", "Share of a step spent waiting for data", "share"),
    ("mfu", "Model FLOPs utilisation", "MFU"),
)
"""Key of `metrics.jsonl`, title, and label of the y axis."""


def draw_loss(facts: RunFacts) -> str:
    """The training and validation loss; with several modalities also one curve for each."""
    steps = facts.records.steps
    points = get_points(steps, "loss")
    series = {"each step": points, "training": smooth_points(points)}
    validation = [
        (float(line["steps_done"]), float(line["loss"]))
        for line in facts.records.validation
        if _is_value(line.get("loss"))
    ]
    if validation:
        series["validation"] = validation
    total = draw_line_chart(
        series,
        x_label=X_LABEL,
        y_label="loss per token",
        colours={"each step": BLUE, "training": BLUE, "validation": RED},
        marks=_mark_restarts(facts.starts),
        pale=("each step",),
        dots=("validation",),
        from_zero=False,
    )
    modalities = sorted({name for line in steps for name in line.get("loss_by_modality") or ()})
    if len(modalities) < 2:
        return total
    parts = draw_line_chart(
        {name: curve for name in modalities if (curve := _get_loss_curve(steps, name))},
        x_label=X_LABEL,
        y_label="loss per token",
        from_zero=False,
    )
    return (
        f'<div class="two"><div><h3>All samples</h3>{total}</div>'
        f"<div><h3>By modality</h3>{parts}</div></div>"
    )


def draw_rates(facts: RunFacts) -> str:
    """One chart for each entry of `RATES` that the run recorded."""
    cells = []
    for key, title, unit in RATES:
        points = get_points(facts.records.steps, key)
        if not points and key == "mfu":
            continue
        ceiling = None
        if key == "grad_norm" and points:
            values = sorted(y for _, y in points)
            ceiling = 3 * values[int(0.98 * (len(values) - 1))]
        series = {"each step": points}
        if key != "lr":
            series["mean"] = smooth_points(points)
        chart = draw_line_chart(
            series,
            x_label=X_LABEL,
            y_label=unit,
            colours=dict.fromkeys(series, BLUE),
            marks=_mark_restarts(facts.starts),
            pale=() if key == "lr" else ("each step",),
            ceiling=ceiling,
            height=210,
        )
        cells.append(f"<div><h3>{title}</h3>{chart}</div>")
    return f'<div class="two">{"".join(cells)}</div>'


def draw_router_load(steps: Sequence[Entry]) -> Iterator[str]:
    """Mean routing weight of each expert, by modality, if the run recorded it.

    Args:
        steps: lines whose `router_load` is {modality: [E]}.
    """
    lines = [
        (float(line["step"]) + 1, line["router_load"])
        for line in steps
        if isinstance(line.get("router_load"), dict)
    ]
    modalities = sorted(
        {name for _, load in lines for name, row in load.items() if isinstance(row, list)}
    )
    if not modalities:
        return
    cells = []
    for name in modalities:
        rows = [(done, row) for done, load in lines if isinstance(row := load.get(name), list)]
        series = {
            f"expert {expert + 1}": [
                (done, to_number(row[expert])) for done, row in rows if len(row) > expert
            ]
            for expert in range(max(len(row) for _, row in rows))
        }
        chart = draw_line_chart(series, x_label=X_LABEL, y_label="routing weight", height=180)
        cells.append(f"<div><h3>{escape(name)}</h3>{chart}</div>")
    yield f'<h2>Router load</h2><div class="two">{"".join(cells)}</div>'


def get_points(steps: Sequence[Entry], key: str) -> Points:
    """(steps done, value) of each line whose value is a number."""
    return [
        (float(line["step"]) + 1, float(line[key])) for line in steps if _is_value(line.get(key))
    ]


def _is_value(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _get_loss_curve(steps: Sequence[Entry], modality: str) -> Points:
    losses = [
        {"step": line["step"], "loss": (line.get("loss_by_modality") or {}).get(modality)}
        for line in steps
    ]
    return smooth_points(get_points(losses, "loss"))


def smooth_points(points: Points) -> Points:
    """Centred mean over a sixtieth of the run; it does not lag behind the steps."""
    half = len(points) // 120
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    ends = [(max(0, i - half), min(len(points), i + half + 1)) for i in range(len(points))]
    return [(x, (sums[b] - sums[a]) / (b - a)) for (x, _), (a, b) in zip(points, ends, strict=True)]


def _mark_restarts(starts: Sequence[Start]) -> dict[float, str]:
    """Restarts on the step axis; a few are labelled, very many are not drawn."""
    steps = [s.first_step for s in starts[1:] if s.first_step is not None]
    if len(steps) > MOST_RESTARTS:
        return {}
    return {float(step): "restart" if len(steps) <= 3 else "" for step in steps}
