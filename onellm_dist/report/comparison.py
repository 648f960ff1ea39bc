"""One page about the runs of a folder (a sweep): what differs between them, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.html.charts import draw_line_chart
from onellm_dist.common.html.page import build_html_page, build_html_table
from onellm_dist.common.logging import get_logger
from onellm_dist.config.yaml_text import dump_inline
from onellm_dist.report.curves import get_points, smooth_points
from onellm_dist.report.facts import RunFacts, load_facts
from onellm_dist.report.records import MARKERS
from onellm_dist.report.summary import RunSummary, build_summary
from onellm_dist.train.records.old_runs import OldRunError

logger = get_logger(__name__)

PLACES = ("run.dir",)
"""Keys that always differ."""
MOST_CURVES = 24
"""More runs are drawn by the best of them: more curves look alike."""
HEADER = ("run", "status", "steps", "loss", "validation loss, best", "tokens/s", "goodput")


@dataclass(frozen=True)
class ComparedRun:
    """One run of a folder."""

    name: str
    facts: RunFacts
    summary: RunSummary
    settings: Mapping[str, Any]
    """Every key of its resolved recipe with its value."""

    @property
    def validation_loss(self) -> float | None:
        """The lowest validation loss."""
        losses = [line.get("loss") for line in self.facts.records.validation]
        numbers = [loss for loss in losses if isinstance(loss, (int, float))]
        return min(numbers, default=None)

    @property
    def rank_key(self) -> tuple[float, float]:
        """Orders runs: by validation loss, then by the loss of the last steps."""
        validation, loss = self.validation_loss, self.summary.loss
        return (
            math.inf if validation is None else validation,
            math.inf if loss is None else loss,
        )


def list_run_directories(folder: Path) -> list[Path]:
    """The run directories in a folder, by name."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_dir() and any((path / marker).exists() for marker in MARKERS)
    )


def is_run(folder: Path) -> bool:
    """Whether a folder is a run directory itself."""
    return any((folder / marker).exists() for marker in MARKERS)


def load_runs(folder: Path) -> list[ComparedRun]:
    """Read the runs of a folder, the best first; those of 0.1.0 are left out, with a warning.

    Args:
        folder: a folder with run directories, such as that of a sweep.

    Raises:
        OldRunError: there are none but those of 0.1.0.
    """
    found, old = [], list[OldRunError]()
    for path in list_run_directories(folder):
        try:
            facts = load_facts(path)
        except OldRunError as error:
            old.append(error)
            logger.warning("%s is left out: it is a run of onellm_dist 0.1.0", path)
            continue
        settings = dict(_flatten(facts.records.config))
        found.append(ComparedRun(path.name, facts, build_summary(facts), settings))
    if old and not found:
        raise old[0]
    return sorted(found, key=lambda run: (run.rank_key, run.name))


def find_differences(runs: Sequence[ComparedRun]) -> list[str]:
    """The keys whose values are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if key not in PLACES and _differs(key, runs)]


def _differs(key: str, runs: Sequence[ComparedRun]) -> bool:
    return any(run.settings.get(key) != runs[0].settings.get(key) for run in runs)


def make_rows(runs: Sequence[ComparedRun]) -> list[tuple[str, ...]]:
    """The table of the runs: a header, and a row for each; keys that differ are columns."""
    keys = find_differences(runs)
    rows = [(*HEADER[:1], *keys, *HEADER[1:])]
    for run in runs:
        summary = run.summary
        wanted = f" of {summary.steps_wanted:,}" if summary.steps_wanted else ""
        rows.append(
            (
                run.name,
                *(dump_inline(run.settings.get(key)) for key in keys),
                summary.status,
                f"{summary.steps_done:,}{wanted}",
                _format(summary.loss, ".4f"),
                _format(run.validation_loss, ".4f"),
                _format(summary.tokens_per_second, ",.0f"),
                _format(summary.goodput, ".1%"),
            )
        )
    return rows


def comparison_to_json(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """The runs for scripts, the best first."""
    keys = find_differences(runs)
    return {
        "differences": keys,
        "runs": [
            {
                "run": str(run.facts.records.directory),
                "settings": {key: run.settings.get(key) for key in keys},
                "validation_loss": run.validation_loss,
                **vars(run.summary),
            }
            for run in runs
        ],
    }


def build_comparison(folder: Path, runs: Sequence[ComparedRun]) -> str:
    """The page as HTML; it contains everything it shows and needs no network."""
    header, *rows = make_rows(runs)
    steps = {run.name: run.facts.records.steps for run in runs}
    losses = {name: smooth_points(get_points(lines, "loss")) for name, lines in steps.items()}
    body = [
        f"<h1>{escape(str(folder))}: {format_count(len(runs), 'run')}</h1>",
        "<p>The best comes first: the lowest validation loss, or else the lowest training loss. "
        "Columns are the keys that differ.</p>",
        build_html_table(header, rows),
        "<h2>Training loss</h2>",
        _draw(runs, losses),
        *_draw_validation(runs),
    ]
    return build_html_page(f"runs of {folder}", body)


def _draw_validation(runs: Sequence[ComparedRun]) -> Iterable[str]:
    curves = {}
    for run in runs:
        lines = [{**line, "step": line["steps_done"] - 1} for line in run.facts.records.validation]
        curves[run.name] = get_points(lines, "loss")
    if any(curves.values()):
        yield "<h2>Validation loss</h2>"
        yield _draw(runs, curves)


def _draw(runs: Sequence[ComparedRun], curves: Mapping[str, list[tuple[float, float]]]) -> str:
    shown = {run.name: curves[run.name] for run in runs if curves[run.name]}
    drawn = dict(list(shown.items())[:MOST_CURVES])
    chart = draw_line_chart(drawn, x_label="steps done", y_label="loss per token", from_zero=False)
    if len(shown) > len(drawn):
        chart += f"<p>The best {len(drawn)} of {len(shown)} runs are drawn.</p>"
    return chart


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _format(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
