"""`onellm report`."""

from __future__ import annotations

import json
from pathlib import Path

from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.common.html.page import write_page
from onellm_dist.report.account import account_of
from onellm_dist.report.attempts import attempts_of
from onellm_dist.report.findings import Facts, findings_of
from onellm_dist.report.page import page_of
from onellm_dist.report.read import read_run
from onellm_dist.report.summary import summary_json, summary_of, summary_text
from onellm_dist.report.troubles import troubles_of

PAGE = "report.html"


def facts_of(directory: Path, *, now: float | None = None) -> Facts:
    """Everything that is to be known of a run directory; nothing in it is changed.

    Raises:
        UsageError: it is no run directory.
    """
    files = read_run(directory, now=now)
    attempts = attempts_of(files)
    return Facts(files, attempts, account_of(attempts), troubles_of(files, attempts))


def report_command(run: Path, out: Path | None, *, as_json: bool) -> int:
    """Write the page (to `RUN/report.html` where `out` is not given) and print a summary, or only print JSON. Returns the exit code.

    Raises:
        UsageError: no run directory, or the page cannot be written.
    """
    facts = facts_of(run)
    summary, findings = summary_of(facts), findings_of(facts)
    if as_json:
        print(json.dumps(summary_json(facts, summary, findings), indent=1, ensure_ascii=False))
        if out is None:
            return EXIT_DONE
    path = out or run / PAGE
    try:
        write_page(path, page_of(facts, summary, findings))
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}.", "the page cannot be written.", "choose another --out."
        ) from error
    if not as_json:
        print(summary_text(facts, summary, findings))
        print(f"the page: {path}")
    return EXIT_DONE
