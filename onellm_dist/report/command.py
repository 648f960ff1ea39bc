"""`onellm report`."""

from __future__ import annotations

import json
from pathlib import Path

from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.common.html.page import write_page
from onellm_dist.report.facts import load_facts
from onellm_dist.report.findings.collect import collect_findings
from onellm_dist.report.page import build_page
from onellm_dist.report.summary import build_summary, summary_to_json, summary_to_text

PAGE = "report.html"


def run_report(run: Path, out: Path | None, *, as_json: bool) -> int:
    """Write the page and print a summary, or print JSON.

    Args:
        run: the run directory.
        out: where to write the page; default: `RUN/report.html`, or no page with `as_json`.
        as_json: print everything that the page says as JSON.

    Returns:
        The exit code.

    Raises:
        UsageError: the folder is not a run directory, or the page cannot be written.
    """
    facts = load_facts(run)
    summary = build_summary(facts)
    findings = collect_findings(facts)
    if as_json:
        print(json.dumps(summary_to_json(facts, summary, findings), indent=1, ensure_ascii=False))
        if out is None:
            return EXIT_DONE
    path = out or run / PAGE
    try:
        write_page(path, build_page(facts, summary, findings))
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}.", "the page cannot be written.", "choose another --out."
        ) from error
    if not as_json:
        print(summary_to_text(facts, summary, findings))
        print(f"page: {path}")
    return EXIT_DONE
