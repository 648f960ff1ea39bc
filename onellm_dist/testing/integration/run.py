"""Runs all phases of an integration run, and measures their time and memory.

OUT/packages/   fetched packages             OUT/align/, OUT/tune/   the two runs
OUT/media/      files and captions           OUT/logs/               output of each command
OUT/shards/     a dataset of each modality   OUT/benchmarks/         official layouts
OUT/evaluation/ answers, scores, pages       OUT/integration.json    the report
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, OneLLMError, UsageError
from onellm_dist.common.logging import get_logger
from onellm_dist.testing.integration import phases
from onellm_dist.testing.integration.evaluation import evaluate_models
from onellm_dist.testing.integration.integration_run import IntegrationRun
from onellm_dist.testing.integration.memory import GIB, PeakMemory
from onellm_dist.testing.integration.report import check_facts, format_report

MEMORY_LIMIT_GIB = 20.0
REPORT = "integration.json"

logger = get_logger(__name__)


def run_integration(
    out: Path, *, steps: int = 3, ranks: int = 2, new_tokens: int = 24, preset: str = "smollm2-135m"
) -> int:
    """Run media, shards, align, tune and generate; log the table and write the report.

    Args:
        out: a folder of its own, empty or with an earlier run, whose packages are kept.
        steps: optimizer steps of each stage.
        ranks: number of ranks under the deepspeed launcher.
        new_tokens: tokens of the longest answer.
        preset: `toy` tries the phases with a tiny model in a minute; it says nothing about the
            real sizes.

    Returns:
        0, or 1 if a phase or a check failed (more than 20 GiB, a frozen part that changed, ...).

    Raises:
        UsageError: `out` holds something else.
    """
    out = out.resolve()
    _prepare_folder(out)
    with PeakMemory() as memory:
        run = IntegrationRun(out, steps, ranks, new_tokens, preset, memory)
        try:
            _run_phases(run)
        except OneLLMError as error:
            run.facts["error"] = str(error)
            logger.error("integration run: %s", error)
        run.facts["seconds"] = round(time.monotonic() - run.started, 1)
    run.facts["peak_gib"] = round(memory.get_peak() / GIB, 2)
    run.facts["limit_gib"] = MEMORY_LIMIT_GIB
    run.facts["checks"] = check_facts(run.facts, steps=steps)
    run.facts["ok"] = all(run.facts["checks"].values())
    (out / REPORT).write_text(json.dumps(run.facts, indent=1) + "\n", encoding="utf-8")
    logger.info("%s", format_report(run.facts))
    return EXIT_DONE if run.facts["ok"] else EXIT_FAILED


def _run_phases(run: IntegrationRun) -> None:
    with run.measure_phase("media"):
        phases.fetch_media(run)
    with run.measure_phase("shards"):
        phases.build_shards(run)
    phases.estimate_time(run)
    for stage in ("align", "tune"):
        with run.measure_phase(stage):
            phases.train(run, stage)
    with run.measure_phase("generate"):
        phases.generate_answers(run)
    with run.measure_phase("evaluate"):
        evaluate_models(run)
    with run.measure_phase("weights"):
        phases.compare_weights(run)


def _prepare_folder(out: Path) -> None:
    """Clear the folder of an earlier run, except for its packages; refuse any other folder."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / REPORT).is_file())):
        raise UsageError(
            f"{out} holds something else than an integration run",
            "its content would be mixed with the run's.",
            "use another --out.",
        )
    for name in ("media", "shards", "align", "tune", "benchmarks", "evaluation", "logs"):
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / REPORT).write_text("{}\n", encoding="utf-8")
