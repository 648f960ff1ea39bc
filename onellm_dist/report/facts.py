"""Everything that is known about a run, for the page and the findings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onellm_dist.report.incidents import Incidents, find_incidents
from onellm_dist.report.records import RunRecords, read_records
from onellm_dist.report.start_history import build_starts
from onellm_dist.report.starts import Start
from onellm_dist.report.time_account import TimeAccount, build_time_account
from onellm_dist.train.records.old_runs import check_run_directory


@dataclass(frozen=True)
class RunFacts:
    """A run directory's records, and what was computed from them."""

    records: RunRecords
    starts: Sequence[Start]
    account: TimeAccount
    incidents: Incidents


def load_facts(directory: Path, *, now: float | None = None) -> RunFacts:
    """Read a run directory; nothing in it is changed.

    Args:
        directory: `run.dir` of a run.
        now: the current time in seconds since 1970; default: the clock's.

    Raises:
        UsageError: the folder is not a run directory.
        OldRunError: it is one of 0.1.0.
    """
    check_run_directory(directory)
    records = read_records(directory, now=now)
    starts = build_starts(records)
    return RunFacts(records, starts, build_time_account(starts), find_incidents(records, starts))
