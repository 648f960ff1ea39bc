"""`onellm rehearse`: a recipe's job script at toy size under a real Slurm on this machine."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onellm_dist.common import run_files
from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, OneLLMError, UsageError
from onellm_dist.common.logging import get_logger
from onellm_dist.config.load import load_config
from onellm_dist.config.recipe_files import find_recipe
from onellm_dist.launch.slurm.script import render
from onellm_dist.launch.slurm.submit import make_job
from onellm_dist.testing.slurm_cluster.cluster import Cluster
from onellm_dist.testing.slurm_cluster.comparison import RunComparison, compare_runs
from onellm_dist.testing.slurm_cluster.requirements import check_requirements
from onellm_dist.testing.slurm_cluster.scenarios import SCENARIOS, Recovery, ScenarioSetup
from onellm_dist.testing.slurm_cluster.toy_size import build_toy_data, make_toy_overrides

GRACE_S = 60
"""Grace period of a preemption; generous, because the machine may be busy."""
PATIENCE_S = 900.0
TIME_LIMIT = "1:00:00"
DEEPSPEED_VARIABLES = ("PATH", "TMPDIR", "OMP_NUM_THREADS", "DS_ACCELERATOR")
HEADING = (
    "scenario",
    "first start ended",
    "steps",
    "lost steps",
    "restarts",
    "nodes",
    "requeue to step",
    "samples",
    "losses",
    "seconds",
)

logger = get_logger(__name__)


@dataclass(frozen=True)
class RehearsalOptions:
    """How the job of a rehearsal is started."""

    recipe: Path
    overrides: tuple[str, ...]
    """key=value at toy size."""
    ranks_per_node: int
    starter: str
    preflight: bool
    out: Path


@dataclass(frozen=True)
class ScenarioResult:
    """A line of the table."""

    scenario: str
    recovery: Recovery
    comparison: RunComparison
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether samples and losses are those of the undisturbed run."""
        return self.comparison.same_samples and self.comparison.same_losses


def rehearse_command(
    recipe: Path,
    overrides: Sequence[str],
    *,
    nodes: int,
    ranks_per_node: int,
    starter: str,
    out: Path,
    only: Sequence[str] = (),
    preflight: bool = False,
) -> int:
    """Rehearse a recipe and log the table.

    Args:
        recipe: a recipe file, or the name of one that ships.
        overrides: key=value of the recipe.
        nodes: nodes of the throw-away Slurm.
        ranks_per_node: ranks on each node.
        starter: what starts the ranks: srun, torchrun or deepspeed.
        out: folder for run directories, logs and job scripts; it replaces an earlier rehearsal's.
        only: names of SCENARIOS; default: all. The clean run always takes place.
        preflight: whether the job script has the preflight in it.

    Returns:
        0, or 1 if a scenario failed, or ended with other samples or losses than the clean run.

    Raises:
        UsageError: the recipe or an option is wrong.
        OneLLMError: no Slurm can run here, or the data cannot be built.
    """
    scenarios = _choose_scenarios(only)
    ranks = nodes * ranks_per_node
    keys = make_toy_overrides(recipe, overrides, ranks=ranks, data=out / "toy")
    check_requirements(ssh=starter == "deepspeed")
    _clear_folder(out)
    build_toy_data(recipe, keys, out / "toy")
    options = RehearsalOptions(recipe, tuple(keys), ranks_per_node, starter, preflight, out)
    with Cluster(nodes, grace_s=GRACE_S, ssh=starter == "deepspeed") as cluster:
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        cluster.env |= {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
        (out / ".deepspeed_env").write_text(format_deepspeed_env(cluster), encoding="utf-8")
        results, failed = _run_scenarios(cluster, options, scenarios)
    logger.info("%s", format_table(results, failed))
    passed = not failed and all(result.passed for result in results)
    return EXIT_DONE if passed else EXIT_FAILED


def _run_scenarios(
    cluster: Cluster, options: RehearsalOptions, scenarios: Sequence[str]
) -> tuple[list[ScenarioResult], list[str]]:
    """Run scenarios; returns their results, and the names of those that failed."""
    results: list[ScenarioResult] = []
    failed: list[str] = []
    clean_run = options.out / _make_slug(scenarios[0])
    for name in scenarios:
        logger.info("rehearsal: %s ...", name)
        started = time.monotonic()
        try:
            setup = _prepare_scenario(cluster, options, name)
            recovery = SCENARIOS[name](setup)
        except OneLLMError as error:
            logger.error("rehearsal: %s: %s", name, error)
            failed.append(name)
            if name == scenarios[0]:  # there is nothing to compare the others with
                break
            _restore_cluster(cluster)
            continue
        comparison = compare_runs(setup.run_dir, clean_run)
        seconds = time.monotonic() - started
        results.append(ScenarioResult(name, recovery, comparison, seconds))
        _remove_weights(setup.run_dir)
    return results, failed


def format_deepspeed_env(cluster: Cluster) -> str:
    """Format `.deepspeed_env`: variables that ranks started through ssh need and do not inherit."""
    return "".join(f"{name}={cluster.env[name]}\n" for name in DEEPSPEED_VARIABLES)


def _prepare_scenario(cluster: Cluster, options: RehearsalOptions, name: str) -> ScenarioSetup:
    slug = _make_slug(name)
    run_dir = (options.out / slug).resolve()
    nodes = len(cluster.nodes)
    recipe = find_recipe(options.recipe).resolve()
    job = make_job(
        recipe,
        [*options.overrides, f"run.dir={run_dir}"],
        nodes=f"1-{nodes}" if nodes > 1 else "1",
        gpus_per_node=options.ranks_per_node,
        preflight=options.preflight,
        ranks_per_node=options.ranks_per_node,
        starter=options.starter,
        name=slug,
        time=TIME_LIMIT,
    )
    script = options.out / f"{slug}.sbatch"
    script.write_text(render(job), encoding="utf-8")
    return ScenarioSetup(
        cluster=cluster,
        script=script.resolve(),
        name=job.name,
        folder=options.out.resolve(),
        run_dir=run_dir,
        every=load_config(recipe, options.overrides).checkpoint.every,
        patience_s=PATIENCE_S,
    )


def format_table(results: Sequence[ScenarioResult], failed: Sequence[str]) -> str:
    """Format the results as plain text; the first one is the reference.

    Args:
        results: results of the scenarios that ended.
        failed: names of the others.
    """
    lines: list[tuple[str, ...]] = [HEADING]
    lines += [_format_result(result, reference=result is results[0]) for result in results]
    lines += [(name, "FAILED", *["-"] * (len(HEADING) - 2)) for name in failed]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADING))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _format_result(result: ScenarioResult, *, reference: bool) -> tuple[str, ...]:
    recovery, comparison = result.recovery, result.comparison
    samples = "the same" if comparison.same_samples else "DIFFER"
    losses = f"within {comparison.largest_gap:.0e}" if comparison.same_losses else "DIFFER"
    if reference:
        samples = losses = "reference"
    return (
        result.scenario,
        recovery.first_status,
        str(comparison.steps),
        str(recovery.lost_steps),
        str(len(recovery.nodes) - 1),
        " -> ".join(map(str, recovery.nodes)),
        "-" if recovery.resume_s is None else f"{recovery.resume_s:.1f} s",
        samples,
        losses,
        f"{result.seconds:.0f}",
    )


def _choose_scenarios(only: Sequence[str]) -> list[str]:
    names = list(SCENARIOS)
    unknown = [name for name in only if name not in SCENARIOS]
    if unknown:
        raise UsageError(
            f"there is no scenario {unknown[0]!r}",
            "nothing was started.",
            f"use any of: {', '.join(names)}.",
        )
    return [name for name in names if not only or name in only or name == names[0]]


def _restore_cluster(cluster: Cluster) -> None:
    """After a failed scenario, empty the queue and bring every node up."""
    cluster.run("scancel", "--user=root", check=False)
    for name in cluster.nodes:
        if not cluster.is_up(name):
            cluster.start_node(name)
    cluster.wait_for_nodes(cluster.nodes)


def _clear_folder(out: Path) -> None:
    """Remove what an earlier rehearsal left, except for its data."""
    out.mkdir(parents=True, exist_ok=True)
    for name in SCENARIOS:
        shutil.rmtree(out / _make_slug(name), ignore_errors=True)
        for path in out.glob(f"{_make_slug(name)}*.*"):
            path.unlink()


def _remove_weights(run_dir: Path) -> None:
    """Remove checkpoints and model of a finished run; its metrics stay."""
    for name in (run_files.CHECKPOINTS, run_files.MODEL):
        shutil.rmtree(run_dir / name, ignore_errors=True)


def _make_slug(name: str) -> str:
    return name.lower().replace(" ", "_")
