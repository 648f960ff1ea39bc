"""`onellm report`."""

from __future__ import annotations

import json
from pathlib import Path

from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.common.html.page import write_page
from onellm_dist.common.output import write_output
from onellm_dist.common.text_table import format_table
from onellm_dist.report.comparison import (
    build_comparison,
    comparison_to_json,
    is_run,
    list_run_directories,
    load_runs,
    make_rows,
)
from onellm_dist.report.facts import load_facts
from onellm_dist.report.findings.collect import collect_findings
from onellm_dist.report.page import build_page
from onellm_dist.report.prediction import build_prediction, make_prediction_rows
from onellm_dist.report.summary import build_summary, summary_to_json, summary_to_text

PAGE = "report.html"
COMPARISON = "comparison.html"


def run_report(run: Path, out: Path | None, *, as_json: bool) -> int:
    """Write the page and print a summary, or print JSON.

    Args:
        run: the run directory, or a folder of run directories, which are compared.
        out: where to write the page; default: `RUN/report.html`, or no page with `as_json`.
        as_json: print everything that the page says as JSON.

    Returns:
        The exit code.

    Raises:
        UsageError: the folder is not a run directory, or the page cannot be written.
    """
    if not is_run(run) and list_run_directories(run):
        return compare_runs(run, out, as_json=as_json)
    facts = load_facts(run)
    summary = build_summary(facts)
    findings = collect_findings(facts)
    prediction = build_prediction(facts.records, facts.starts)
    if as_json:
        content = summary_to_json(facts, summary, findings)
        content["prediction"] = None if prediction is None else prediction.to_json()
        write_output(json.dumps(content, indent=1, ensure_ascii=False))
        if out is None:
            return EXIT_DONE
    path = out or run / PAGE
    _write(path, build_page(facts, summary, findings, prediction))
    if not as_json:
        write_output(summary_to_text(facts, summary, findings))
        if prediction is not None and prediction.figures:
            write_output(f"predicted and measured ({prediction.device}):")
            lines = format_table(make_prediction_rows(prediction), right=(1, 2, 3))
            write_output("\n".join(f"  {line}" for line in lines))
        write_output(f"page: {path}")
    return EXIT_DONE


def compare_runs(folder: Path, out: Path | None, *, as_json: bool) -> int:
    """Write the page that compares the runs of a folder, and print its table, or print JSON.

    Args:
        folder: the folder of a sweep.
        out: where to write the page; default: `FOLDER/comparison.html`, or no page with `as_json`.
        as_json: print the figures as JSON.

    Returns:
        The exit code.

    Raises:
        UsageError: the page cannot be written.
    """
    runs = load_runs(folder)
    if as_json:
        write_output(json.dumps(comparison_to_json(runs), indent=1, ensure_ascii=False))
        if out is None:
            return EXIT_DONE
    path = out or folder / COMPARISON
    _write(path, build_comparison(folder, runs))
    if not as_json:
        write_output("\n".join(format_table(make_rows(runs))))
        write_output(f"page: {path}")
    return EXIT_DONE


def _write(path: Path, page: str) -> None:
    try:
        write_page(path, page)
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}.", "the page cannot be written.", "choose another --out."
        ) from error
