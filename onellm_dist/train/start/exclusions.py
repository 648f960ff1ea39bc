"""Lists of excluded samples of a run: those that a start reads, and what it says about them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onellm_dist.common.counts import format_count
from onellm_dist.common.run_files import EXCLUDE_LIST
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.exclusion_check import find_unused_entries
from onellm_dist.data.exclusions import Exclusions, read_exclusions
from onellm_dist.data.plan import Plan
from onellm_dist.train.checkpoint.inherit import find_source_run
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.records.events import Events

if TYPE_CHECKING:
    from onellm_dist.train.checkpoint.resume import ResumeTarget


def read_run_exclusions(config: RunConfig, target: ResumeTarget, dist: Distributed) -> Exclusions:
    """Read the lists of samples that are left out: as rank 0 sees them. All ranks call it together.

    They are `data.exclude`, the run's own list, and that of another run whose checkpoint is
    resumed (`apply_resume` adds its entries to the own list, once nothing is left to refuse).

    Raises:
        UsageError: a list cannot be read.
    """
    return dist.ask_rank_zero(
        lambda: read_exclusions(config.data.exclude, *_find_kept_lists(config, target))
    )


def _find_kept_lists(config: RunConfig, target: ResumeTarget) -> list[Path]:
    source = find_source_run(config.run.dir, target)
    runs = [config.run.dir, *([] if source is None else [source])]
    return [run / EXCLUDE_LIST for run in runs if (run / EXCLUDE_LIST).exists()]


def write_exclusions(events: Events, plan: Plan, validation_plan: Plan | None) -> None:
    """Write the event of the lists of excluded samples, if there are entries. Rank 0 calls it."""
    entries = plan.corpus.exclusions.entries
    if not entries:
        return
    corpora = [opened.corpus for opened in (plan, validation_plan) if opened is not None]
    unused = find_unused_entries(entries, [(c.datasets, c.shards) for c in corpora])
    count = len(entries)
    text = f"{format_count(count, 'entry', 'entries')} of excluded samples or shards"
    details = unused.describe()
    left = count - sum(unused.other_datasets.values()) - len(unused.unmatched)
    events.write(
        "exclusions",
        entries=count,
        other_datasets=unused.other_datasets,
        unmatched=unused.unmatched,
        message=f"{text}; {details}" if details else text,
        warning=bool(unused.unmatched or unused.similar) or left == 0,
    )
