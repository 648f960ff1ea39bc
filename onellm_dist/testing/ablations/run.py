"""`onellm ablate`: a queue of runs on the toy world that can be interrupted and resumed."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, OneLLMError, UsageError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.logging import get_logger
from onellm_dist.common.progress import format_seconds
from onellm_dist.launch.local import exit_by_signal, handle_termination
from onellm_dist.testing.ablations.layout import Ablation, Entry, Step
from onellm_dist.testing.ablations.results import EntryResult, list_results, score_entry
from onellm_dist.testing.ablations.sizes import SIZES
from onellm_dist.testing.ablations.tables import build_tables, format_tables
from onellm_dist.testing.ablations.tables_page import write_tables
from onellm_dist.testing.ablations.variants import choose_variants
from onellm_dist.testing.demo.layout import count_ranks, describe_device
from onellm_dist.testing.demo.processes import DemoProcess, run_lanes

JOURNAL = "ablation.json"

logger = get_logger(__name__)


def run_ablations(out: Path, size: str, seeds: int, only: Sequence[str] = ()) -> int:
    """Train what is missing, then write the tables and the page from all results that are there.

    An entry that fails does not hold up the others; the next start tries it again.

    Args:
        out: the folder.
        size: a name of SIZES.
        seeds: number of seeds, from 0.
        only: names of variants; default: all.

    Returns:
        0, or 1 if an entry failed.

    Raises:
        UsageError: an unknown variant or size, a variant that this size cannot train, or `out`
            holds something else.
        OneLLMError: the datasets or the towers could not be made.
    """
    if size not in SIZES:
        raise UsageError(
            f"unknown size {size!r}", "nothing was started.", f"use one of: {', '.join(SIZES)}."
        )
    chosen = SIZES[size]
    variants = choose_variants(tuple(only), joint=chosen.joint_steps > 0)
    ablation = Ablation(out.resolve(), chosen, chosen.ranks or count_ranks())
    open_journal(ablation)
    handle_termination(exit_by_signal)  # so that the child processes are ended too
    # seed by seed, so that a whole table is there after the first one
    entries = [Entry(variant, seed) for seed in range(seeds) for variant in variants]
    missing = [entry for entry in entries if not ablation.get_result(entry).exists()]
    logger.info("%d of %d runs are done in %s", len(entries) - len(missing), len(entries), out)
    if missing:
        encoders = sorted({entry.variant.encoder for entry in missing})
        for step in ablation.list_preparation(encoders):
            run_step(ablation, step, f"preparing: {step.name}", step.name)
    failed = _run_entries(ablation, missing)
    tables = build_tables(list_results(ablation.out))
    logger.info("%s", format_tables(tables))
    page = write_tables(ablation.out, tables, chosen, describe_device())
    logger.info("\nreport: %s", page)
    if failed:
        logger.error("failed: %s; the same command tries them again", ", ".join(failed))
    return EXIT_FAILED if failed else EXIT_DONE


def _run_entries(ablation: Ablation, missing: Sequence[Entry]) -> list[str]:
    """Run entries one after the other; returns the names of those that failed."""
    failed: list[str] = []
    started = time.monotonic()
    for number, entry in enumerate(missing):
        left = ""
        if number:
            each = (time.monotonic() - started) / number
            left = f", about {format_seconds(each * (len(missing) - number))} left"
        logger.info("[%d/%d] %s%s", number + 1, len(missing), entry.name, left)
        try:
            run_entry(ablation, entry)
        except OneLLMError as error:
            logger.error("%s: %s", entry.name, error)
            failed.append(entry.name)
    return failed


def run_entry(ablation: Ablation, entry: Entry) -> EntryResult:
    """Run the commands of an entry that are left, score its captions, and remove its models.

    Raises:
        OneLLMError: a command failed.
    """
    begun = time.monotonic()
    for step in ablation.list_steps(entry):
        run_step(ablation, step, step.name, f"{entry.name}-{step.name}")
    result = score_entry(entry, ablation.list_captions(entry), time.monotonic() - begun)
    path = ablation.get_result(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(result.to_json(), indent=1) + "\n")
    shutil.rmtree(ablation.get_folder(entry))
    return result


def run_step(ablation: Ablation, step: Step, title: str, log: str) -> None:
    """Run a command, unless it has ended well before.

    Raises:
        OneLLMError: it failed; the message has the end of its output.
    """
    if step.done.exists():
        return
    step.done.parent.mkdir(parents=True, exist_ok=True)
    logger.info("  %s", title)
    process = DemoProcess(step.name, step.command, ablation.get_log(log))
    run_lanes([[process]], lambda _: None)
    write_atomic(step.done, "")


def open_journal(ablation: Ablation) -> None:
    """Make the folder, or check that it holds an ablation of this size.

    Raises:
        UsageError: it holds something else.
    """
    path = ablation.out / JOURNAL
    wanted = {"size": ablation.size.name}
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found == wanted:
            return
        problem = f"{ablation.out} holds an ablation of size {found.get('size')}"
    elif ablation.out.exists() and any(ablation.out.iterdir()):
        problem = f"{ablation.out} is not empty"
    else:
        ablation.out.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(wanted) + "\n")
        return
    raise UsageError(
        problem, "results of both would be mixed.", "remove it, or use another folder with --out."
    )
