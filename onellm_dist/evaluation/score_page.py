"""The scores as a page, and as lines for a terminal."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from onellm_dist.common.counts import format_count
from onellm_dist.common.html.page import build_html_page, build_html_table, write_page
from onellm_dist.evaluation.answer_folder import EXAMPLES, name_picture
from onellm_dist.evaluation.compare import ScoreDifference
from onellm_dist.evaluation.questions import BenchmarkQuestion
from onellm_dist.evaluation.score import TaskScore
from onellm_dist.evaluation.scorers.measure import Measure

PAGE = "report.html"
_HEAD = ("task", "measure", "n", "score", "95% interval", "OneLLM-7B (paper)")
_MOST_ROWS = 40
_STYLE = (
    ".ex{display:flex;gap:1rem;margin:.8rem 0;align-items:flex-start}"
    ".ex img{max-width:300px;object-fit:contain}"
)


def list_rows(scores: Sequence[TaskScore]) -> Iterator[tuple[str, str, str, str, str, str]]:
    """The rows of the main table, as text."""
    for score in scores:
        name = score.task.name
        if part := score.describe_part():
            name += f" (incomplete: {part})"
        for measure in score.measures:
            interval = measure.compute_interval()
            paper = score.task.paper.get(measure.name)
            yield (
                name,
                measure.name,
                f"{measure.n:,}",
                f"{interval.mean:.1f}",
                f"{interval.low:.1f} to {interval.high:.1f}",
                "" if paper is None else f"{paper:.1f}",
            )
        for missing, why in score.missing.items():
            paper = score.task.paper.get(missing)
            shown = "" if paper is None else f"{paper:.1f}"
            yield name, missing, "", "not computed", why, shown


def format_scores(scores: Sequence[TaskScore]) -> str:
    """The main table for a terminal."""
    return _align([_HEAD, *list_rows(scores)])


def format_differences(differences: Sequence[ScoreDifference]) -> str:
    """A comparison for a terminal."""
    head = ("task", "measure", "n", "first", "second", "difference", "95% interval", "")
    rows = [
        (
            d.task,
            d.measure,
            f"{d.units:,}",
            f"{d.first:.1f}",
            f"{d.second:.1f}",
            f"{d.difference.mean:+.1f}",
            f"{d.difference.low:+.1f} to {d.difference.high:+.1f}",
            "clear" if d.is_clear else "not clear",
        )
        for d in differences
    ]
    parts = dict.fromkeys((d.task, d.part) for d in differences if d.part)
    lines = [f"{task} is incomplete: {part}" for task, part in parts]
    return "\n".join([_align([head, *rows]), *lines])


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def write_score_page(out: Path, scores: Sequence[TaskScore]) -> Path:
    """Write the page."""
    body = ["<h1>Evaluation</h1>", _describe_model(scores)]
    body.append(build_html_table(_HEAD, list_rows(scores), right=(2, 3, 5)))
    body.append(
        '<p class="dim">Scores are on the scale of the papers. Intervals: Wilson for shares of '
        "single questions, else the bootstrap over questions or media.</p>"
    )
    for score in scores:
        body += _build_task(score)
    write_page(out / PAGE, build_html_page("Evaluation", body, style=_STYLE))
    return out / PAGE


def _describe_model(scores: Sequence[TaskScore]) -> str:
    models = sorted({str(score.settings["model"]) for score in scores})
    return f'<p class="dim">Model {escape(", ".join(models))}</p>'


def _build_task(score: TaskScore) -> Iterator[str]:
    task, settings = score.task, score.settings
    said = f"{task.summary} {task.note}".strip()
    yield f"<h2>{escape(task.title)}</h2><p>{escape(said)}</p>"
    yield (
        f'<p class="dim">Split {escape(settings["split"])}, prompt {escape(settings["prompt"])}, '
        f"format {escape(settings['format'])}"
        f"{', decoded as the reference' if settings['as_reference'] else ', greedy'}.</p>"
    )
    if gaps := score.describe_gaps():
        yield (
            f"<p><b>Incomplete: {score.describe_part()}.</b> "
            f"{escape(gaps)}. Do not compare it with the paper or with another set.</p>"
        )
    for measure in score.measures:
        for table in measure.labels:
            yield from _build_categories(measure, table)
    yield from _build_examples(score)


def _build_categories(measure: Measure, table: str) -> Iterator[str]:
    parts = measure.split(table)
    if len(parts) < 2:
        return
    yield f"<h3>{escape(measure.name)} by {escape(table)}</h3>"
    rows = []
    for name, part in list(parts.items())[:_MOST_ROWS]:
        interval = part.compute_interval()
        shown = f"{interval.low:.1f} to {interval.high:.1f}"
        rows.append((name, len(part.units), f"{interval.mean:.1f}", shown))
    yield build_html_table((table, "n", "score", "95% interval"), rows, right=(1, 2))
    if len(parts) > _MOST_ROWS:
        yield f'<p class="dim">and {len(parts) - _MOST_ROWS} more</p>'


def _build_examples(score: TaskScore) -> Iterator[str]:
    own = {
        unit: _mark_answer(measure, float(row[0] / row[1]))
        for measure in score.measures[:1]
        if measure.rows.shape[1:] == (2,)
        for unit, row in zip(measure.units, measure.rows, strict=True)
    }
    shown = []
    drawn = {path.stem: path for path in sorted((score.folder / EXAMPLES).glob("*.png"))}
    seen: set[Path] = set()
    for question in score.questions:
        picture = drawn.get(name_picture(question.medium))
        if picture is not None and picture not in seen and question.id in score.answers:
            seen.add(picture)
            shown.append(_build_example(score, question, picture, *own.get(question.id, ("", ""))))
    if shown:
        yield "<h3>Examples</h3>"
        yield from shown


def _mark_answer(measure: Measure, value: float) -> tuple[str, str]:
    """How an answer is coloured, if it is right or wrong, and what is said of it, if not."""
    if measure.is_share:
        return (' class="right"' if value else ' class="wrong"'), ""
    return "", f"{escape(measure.name)} {100 * value:.1f}<br>"


def _build_example(
    score: TaskScore, question: BenchmarkQuestion, picture: Path, kind: str, said: str
) -> str:
    answer = score.answers[question.id]
    image = base64.b64encode(picture.read_bytes()).decode()
    asked = [f"<b>{escape(question.text)}</b>"] if question.text else []
    asked += [f"{'ABCDEFGHIJ'[i]}. {escape(o)}" for i, o in enumerate(question.options)]
    references = "; ".join(question.answers[:5])
    return (
        f'<div class="ex"><img alt="" src="data:image/png;base64,{image}"><div>'
        f"{'<br>'.join(asked)}"
        f"<p{kind}>{escape(answer.answer) or '<i>(empty)</i>'}</p>"
        f'<p class="dim">{said}reference: {escape(references)}<br>'
        f"ended by {escape(answer.ended)} after "
        f"{format_count(answer.tokens, 'token')}</p></div></div>"
    )
