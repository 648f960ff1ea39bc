"""The demo's report: one HTML file with its pictures inside, readable without a network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from onellm_dist.common.html.charts import draw_line_chart, draw_router_chart, smooth
from onellm_dist.common.html.page import build_html_page, write_page
from onellm_dist.evaluation.report import ModalityResult

if TYPE_CHECKING:
    from PIL import Image

STYLE = """
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:1rem}
figure{margin:0;background:var(--soft);border-radius:6px;padding:.6rem}
figure img{width:100%;height:auto;border-radius:4px;display:block}
figcaption{font-size:13px;margin-top:.4rem}
""".strip()
RESULTS_TEXT = (
    "Exact match and token F1 of the greedy caption, with 95% intervals. <em>Shuffled</em> is the "
    "same model given another sample's input. <em>Chance</em> is a caption drawn uniformly from "
    "all captions of the modality. <em>Held-out</em> combinations of attributes were in no stage "
    "of training, nor in the pretraining of the toy towers."
)
COLUMNS = (
    "modality",
    "split",
    "n",
    "exact match",
    "token F1",
    "shuffled EM",
    "shuffled F1",
    "chance EM / F1",
    "better than its control",
    "example",
)
PICTURE_WIDTH = 480
CURVE_POINTS = 100


@dataclass(frozen=True)
class Curve:
    """The loss of one run.

    Attributes:
        name: title of the curve.
        loss: (step, loss) of every step.
        by_modality: (step, loss) of the steps that had the modality.
        marks: labels of single steps (a kill, a resume).
    """

    name: str
    loss: Sequence[tuple[float, float]]
    by_modality: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    marks: Mapping[float, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ShownSample:
    """One held-out sample as a person looks at it."""

    modality: str
    picture: Image.Image
    reference: str
    prediction: str
    split: str


@dataclass(frozen=True)
class DemoReport:
    """Everything that the page shows."""

    title: str
    facts: Mapping[str, str]
    results: Sequence[ModalityResult]
    curves: Sequence[Curve]
    routers: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
    """Stage to modality to router weights [Q][E]."""
    samples: Sequence[ShownSample]
    timetable: Sequence[tuple[str, float, float]]
    """Name, predicted seconds and taken seconds of each stage."""
    notes: Sequence[str] = ()


def write_report(path: Path, report: DemoReport) -> None:
    """Write the page; the file holds everything that it shows.

    Args:
        path: the HTML file.
        report: the contents.
    """
    routers = [
        f"<h3>{html.escape(stage)}</h3>{draw_router_chart(weights)}"
        for stage, weights in report.routers.items()
    ]
    body = [
        f"<h1>{html.escape(report.title)}</h1>",
        _format_facts(report.facts),
        "<h2>What the model says about samples it never saw</h2>",
        f"<p>{RESULTS_TEXT}</p>",
        _format_results(report.results),
        *(f"<p>{html.escape(note)}</p>" for note in report.notes),
        "<h2>Samples</h2>",
        _format_samples(report.samples),
        "<h2>Loss</h2>",
        *map(_format_curve, report.curves),
        "<h2>Router weights by expert and modality</h2>",
        *routers,
        "<h2>Time</h2>",
        _format_timetable(report.timetable),
    ]
    write_page(path, build_html_page(report.title, body, style=STYLE))


def encode_picture(picture: Image.Image, *, widest: int = PICTURE_WIDTH) -> str:
    """Encode a picture as a data URI (PNG).

    Args:
        picture: the picture.
        widest: largest width; a wider picture is scaled down.
    """
    if picture.width > widest:
        picture = picture.resize((widest, max(1, round(picture.height * widest / picture.width))))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _format_facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items()
    )
    return f"<table>{rows}</table>"


def _format_results(results: Sequence[ModalityResult]) -> str:
    rows = []
    for result in results:
        for name, split in result.splits.items():
            own, shuffled, example = split.own, split.shuffled, split.example
            cells = [
                html.escape(result.modality),
                html.escape(name.replace("_", " ")),
                own.n,
                own.exact_match,
                own.token_f1,
                shuffled.exact_match,
                shuffled.token_f1,
                f"{split.chance[0]:.3f} / {split.chance[1]:.2f}",
                "yes" if split.beats_control else "no",
                _format_answer(example.prediction, example.reference),
            ]
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _format_answer(prediction: str, reference: str) -> str:
    right = prediction.split() == reference.split()
    style = "right" if right else "wrong"
    answer = f'<span class="{style}">{html.escape(prediction) or "(nothing)"}</span>'
    if right:
        return answer
    return f'{answer}<br><span class="dim">truth: {html.escape(reference)}</span>'


def _format_samples(samples: Sequence[ShownSample]) -> str:
    figures = []
    for sample in samples:
        name, split = html.escape(sample.modality), html.escape(sample.split.replace("_", " "))
        answer = _format_answer(sample.prediction, sample.reference)
        figures.append(
            f'<figure><img alt="{name} sample" src="{encode_picture(sample.picture)}">'
            f'<figcaption><b>{name}</b> <span class="dim">{split}</span><br>{answer}</figcaption>'
            "</figure>"
        )
    return f'<div class="samples">{"".join(figures)}</div>'


def _format_curve(curve: Curve) -> str:
    window = max(1, len(curve.loss) // CURVE_POINTS)
    charts = [_draw_lines({"loss": curve.loss}, window, marks=curve.marks)]
    if curve.by_modality:
        charts.append(_draw_lines(curve.by_modality, window))
        charts = [f'<div class="two">{"".join(f"<div>{chart}</div>" for chart in charts)}</div>']
    return f"<h3>{html.escape(curve.name)}</h3>{charts[0]}"


def _draw_lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    window: int,
    marks: Mapping[float, str] | None = None,
) -> str:
    smoothed = {name: _smooth_line(line, window) for name, line in lines.items()}
    return draw_line_chart(
        smoothed, x_label="optimizer step", y_label="loss per token", marks=marks or {}
    )


def _smooth_line(line: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    return list(zip([x for x, _ in line], smooth([y for _, y in line], window), strict=True))


def _format_timetable(rows: Sequence[tuple[str, float, float]]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{predicted:.0f} s</td><td>{taken:.0f} s</td></tr>"
        for name, predicted, taken in rows
    )
    predicted, taken = sum(row[1] for row in rows), sum(row[2] for row in rows)
    total = f"<tr><th>all</th><th>{predicted:.0f} s</th><th>{taken:.0f} s</th></tr>"
    head = "<tr><th>stage</th><th>predicted</th><th>taken</th></tr>"
    return f"<table>{head}{cells}{total}</table>"
