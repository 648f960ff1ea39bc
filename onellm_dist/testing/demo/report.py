"""The demo's report: one HTML file with its pictures inside, readable without a network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from onellm_dist.common.html.charts import line_chart, router_chart, smooth
from onellm_dist.common.html.page import html_page, write_page
from onellm_dist.evaluation.report import ModalityResult

if TYPE_CHECKING:
    from PIL import Image

_STYLE = """
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:1rem}
figure{margin:0;background:var(--soft);border-radius:6px;padding:.6rem}
figure img{width:100%;height:auto;border-radius:4px;display:block}figcaption{font-size:13px;margin-top:.4rem}
""".strip()

_COLUMNS = (
    *("modality", "split", "n", "exact match", "token F1", "shuffled EM", "shuffled F1"),
    *("chance EM / F1", "beats its control", "example"),
)


@dataclass(frozen=True)
class Curve:
    """The loss of one run, a value a step.

    `by_modality` holds (step, loss) where the modality was part of the step; `marks` names steps (a kill, a resume).
    """

    name: str
    loss: Sequence[tuple[float, float]]
    by_modality: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    marks: Mapping[float, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One held-out sample as a person looks at it."""

    modality: str
    picture: Image.Image
    reference: str
    prediction: str
    split: str


@dataclass(frozen=True)
class Report:
    """Everything the page shows."""

    title: str
    facts: Mapping[str, str]
    results: Sequence[ModalityResult]
    curves: Sequence[Curve]
    routers: Mapping[str, Mapping[str, Sequence[Sequence[float]]]]
    """Stage -> modality -> [Q][E]."""
    samples: Sequence[Sample]
    timetable: Sequence[tuple[str, float, float]]
    """(what, seconds predicted, seconds taken)."""
    notes: Sequence[str] = ()


def write_report(path: Path, report: Report) -> None:
    """Write the page; the file holds everything it shows."""
    body = [
        f"<h1>{html.escape(report.title)}</h1>",
        _facts(report.facts),
        "<h2>What the model says about samples it never saw</h2>",
        "<p>Exact match and token F1 of the greedy caption, with 95% intervals; <em>shuffled</em> is the same model given another "
        "sample's input; <em>chance</em> is a caption drawn evenly from all of the modality's. <em>Held-out</em> combinations of "
        "attributes were in no stage of training, nor in the stand-in towers' pretraining.</p>",
        _results(report.results),
        "".join(f"<p>{html.escape(n)}</p>" for n in report.notes),
        "<h2>Samples</h2>",
        _samples(report.samples),
        "<h2>Loss</h2>",
        *[_curve(c) for c in report.curves],
        "<h2>Router weights by expert and modality</h2>",
        *[
            f"<h3>{html.escape(stage)}</h3>{router_chart(weights)}"
            for stage, weights in report.routers.items()
        ],
        "<h2>Time</h2>",
        _timetable(report.timetable),
    ]
    write_page(path, html_page(report.title, body, style=_STYLE))


def picture_uri(picture: Image.Image, *, widest: int = 480) -> str:
    """The picture as a data URI (PNG), scaled down to at most `widest` pixels."""
    if picture.width > widest:
        picture = picture.resize((widest, max(1, round(picture.height * widest / picture.width))))
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _facts(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items()
    )
    return f"<table>{rows}</table>"


def _results(results: Sequence[ModalityResult]) -> str:
    head = "".join(f"<th>{column}</th>" for column in _COLUMNS)
    rows = []
    for result in results:
        for name, split in result.splits.items():
            rows.append(
                f"<tr><td>{html.escape(result.modality)}</td><td>{html.escape(name.replace('_', ' '))}</td><td>{split.own.n}</td>"
                f"<td>{split.own.exact_match}</td><td>{split.own.token_f1}</td><td>{split.shuffled.exact_match}</td><td>{split.shuffled.token_f1}</td>"
                f"<td>{split.chance[0]:.3f} / {split.chance[1]:.2f}</td><td>{'yes' if split.beats_control else 'no'}</td>"
                f"<td>{_said(split.example.prediction, split.example.reference)}</td></tr>"
            )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _said(prediction: str, reference: str) -> str:
    right = prediction.split() == reference.split()
    said = f'<span class="{"right" if right else "wrong"}">{html.escape(prediction) or "(nothing)"}</span>'
    return said if right else f'{said}<br><span class="dim">truth: {html.escape(reference)}</span>'


def _samples(samples: Sequence[Sample]) -> str:
    figures = [
        f'<figure><img alt="{html.escape(s.modality)} sample" src="{picture_uri(s.picture)}"><figcaption><b>{html.escape(s.modality)}</b> '
        f'<span class="dim">{html.escape(s.split.replace("_", " "))}</span><br>{_said(s.prediction, s.reference)}</figcaption></figure>'
        for s in samples
    ]
    return f'<div class="samples">{"".join(figures)}</div>'


def _curve(curve: Curve) -> str:
    window = max(1, len(curve.loss) // 100)
    total = line_chart(
        {"loss": _smoothed(curve.loss, window)},
        x_label="optimizer step",
        y_label="loss a token",
        marks=curve.marks,
    )
    if not curve.by_modality:
        return f"<h3>{html.escape(curve.name)}</h3>{total}"
    lines = {m: _smoothed(line, window) for m, line in curve.by_modality.items()}
    parts = line_chart(lines, x_label="optimizer step", y_label="loss a token")
    return f'<h3>{html.escape(curve.name)}</h3><div class="two"><div>{total}</div><div>{parts}</div></div>'


def _smoothed(line: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    return list(zip([x for x, _ in line], smooth([y for _, y in line], window), strict=True))


def _timetable(rows: Sequence[tuple[str, float, float]]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(w)}</td><td>{p:.0f} s</td><td>{t:.0f} s</td></tr>"
        for w, p, t in rows
    )
    total = f"<tr><th>all</th><th>{sum(p for _, p, _ in rows):.0f} s</th><th>{sum(t for _, _, t in rows):.0f} s</th></tr>"
    return f"<table><tr><th>stage</th><th>predicted</th><th>taken</th></tr>{cells}{total}</table>"
