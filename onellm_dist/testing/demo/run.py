"""`onellm demo`: everything once on the toy world, through the public commands.

The first run is killed midway and resumed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED
from onellm_dist.common.logging import get_logger
from onellm_dist.common.progress import format_seconds
from onellm_dist.evaluation.captioning import read_captions
from onellm_dist.evaluation.report import ModalityResult, format_table, to_json_rows
from onellm_dist.evaluation.toy_captions import score_toy_captions
from onellm_dist.launch.local import exit_by_signal, handle_termination
from onellm_dist.testing.demo.journal import Journal, open_journal
from onellm_dist.testing.demo.layout import RUNS, Demo, count_ranks, describe_device
from onellm_dist.testing.demo.report_data import collect_report
from onellm_dist.testing.demo.scale import FULL, QUICK
from onellm_dist.testing.demo.stages import caption_test_splits, make_towers_and_shards, train
from onellm_dist.testing.demo.timetable import DemoStage, Timetable, measure_slowdown

START_UP_S = 20.0
"""Seconds that a launcher and its ranks need besides the steps: imports, engine, checkpoint."""

logger = get_logger(__name__)


def run_demo(out: Path, full: bool = False) -> int:
    """Run everything, log the table, and write `report.html`, `table.txt` and `results.json`.

    If interrupted, the same command resumes with the unfinished stage. Once everything is finished,
    it only shows the table again.

    Args:
        out: folder of the demo.
        full: whether to train three times as many steps.

    Returns:
        0, or 1 if a modality is no better than its control with shuffled inputs.

    Raises:
        UsageError: `out` holds something else, or a demo of the other size.
        OneLLMError: one of the commands failed.
    """
    demo = Demo(out.resolve(), FULL if full else QUICK, ranks=count_ranks())
    journal = open_journal(demo.out, full=full)
    handle_termination(exit_by_signal)  # so that the child processes are ended too
    slowdown = measure_slowdown()
    table = Timetable(make_stages(demo, slowdown), journal)
    logger.info(
        "onellm demo in %s: %s on %s; this machine reaches %.2f of the reference's speed",
        demo.out,
        format_count(demo.ranks, "rank"),
        describe_device(),
        1 / slowdown,
    )
    table.show()
    stages: list[Callable[[Demo, Timetable, Journal], None]] = [
        make_towers_and_shards,
        *(partial(train, name=name) for name in RUNS),
        caption_test_splits,
    ]
    for stage in stages:
        if table.start_stage():
            stage(demo, table, journal)
            table.finish_stage()
    results = score_toy_captions(read_captions(demo.captions))
    if table.start_stage():
        _write_results(demo, results, table)
        table.finish_stage()
    logger.info("%s", format_table(results))
    logger.info("\nreport: %s   all in %s", demo.report, format_seconds(table.taken))
    return get_exit_code(results)


def make_stages(demo: Demo, slowdown: float) -> list[DemoStage]:
    """Make the stages of the demo with their predicted seconds.

    Args:
        demo: the demo.
        slowdown: how many times slower this machine is than the reference machine.
    """
    scale = demo.scale
    side_by_side = max(scale.clip_seconds, scale.llm_seconds + scale.shards_seconds)
    stages = [DemoStage("towers and shards", (side_by_side + 10) * slowdown)]
    for name, run in zip(RUNS, scale.runs, strict=True):
        starts = 2 if name == RUNS[0] else 1
        title = f"{name.replace('_', ' ')} ({format_count(run.steps, 'step')})"
        seconds = run.steps * run.step_seconds + starts * START_UP_S
        stages.append(DemoStage(title, seconds * slowdown))
    seconds = scale.caption_seconds / 2 + 10
    stages.append(DemoStage("captions of test samples", seconds * slowdown))
    return [*stages, DemoStage("table and report", 8 * slowdown)]


def _write_results(demo: Demo, results: Sequence[ModalityResult], table: Timetable) -> None:
    (demo.out / "table.txt").write_text(format_table(results) + "\n", encoding="utf-8")
    record = {"seconds": table.taken, "results": to_json_rows(results)}
    (demo.out / "results.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    collect_report(
        demo.report,
        results=results,
        captions=read_captions(demo.captions),
        toy=demo.toy,
        runs={name: demo.run_dir(name) for name in RUNS},
        pretrained=demo.pretrained,
        timetable=[(s.name, s.predicted, s.taken or 0.0) for s in table.stages],
        device=f"{format_count(demo.ranks, 'rank')} on {describe_device()}",
    )


def get_exit_code(results: Sequence[ModalityResult]) -> int:
    """0 if every modality is better than its control on every split, else 1."""
    failed = [
        f"{result.modality} ({name})"
        for result in results
        for name, split in result.splits.items()
        if not split.beats_control
    ]
    if failed:
        logger.error(
            "no better than their controls with shuffled inputs, by the 95%% intervals: %s",
            ", ".join(failed),
        )
        return EXIT_FAILED
    return EXIT_DONE
