"""From the arguments of `onellm evaluate` to a Slurm job that answers them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer

from onellm_dist.cli import evaluate
from onellm_dist.cli.evaluate_group import check_group
from onellm_dist.common.errors import UsageError
from onellm_dist.launch.slurm.job import SlurmJob


def make_job_of_evaluation(
    arguments: Sequence[str], nodes: str, options: Mapping[str, Any]
) -> SlurmJob:
    """Make the job of an evaluation; wrong arguments are refused before anything is queued.

    Args:
        arguments: what `onellm evaluate` is given.
        nodes: number of nodes.
        options: fields of `SlurmJob`.

    Raises:
        click.UsageError: `onellm evaluate` would refuse the arguments.
        UsageError: a task or a prompt is unknown, or the job cannot work.
    """
    from onellm_dist.evaluation.tasks import get_task
    from onellm_dist.launch.slurm.submit import make_evaluation_job

    group: Any = typer.main.get_command(evaluate.app)
    given = group.commands["evaluate"].make_context("onellm evaluate", list(arguments)).params
    # Texts here where Typer converts when it calls the command (0.18), as it did on top of click.
    model, data, out = (Path(given[name]) for name in ("model", "data", "out"))
    if Path(arguments[0]) != model:
        raise UsageError(
            f"{arguments[0]} stands before the model",
            "the script names the model first.",
            f"write: -- {model} TASK... and the options behind them.",
        )
    for name in given["tasks"]:
        get_task(name).get_prompt(given["prompt"])
    if given["ranks"] is not None:
        raise UsageError(
            f"--ranks {given['ranks']} in a job",
            "the job's launcher starts the ranks.",
            "use --gpus-per-node or --ranks-per-node of onellm launch.",
        )
    if given["adapter"]:
        raise UsageError(
            f"--adapter {given['adapter'][0]} in a job",
            "a job ends when one folder of answers is complete.",
            "submit a job for each: the folder of an adapter stands in the place of the model.",
        )
    job = make_evaluation_job(
        model,
        arguments[1:],
        tasks=given["tasks"],
        data=data,
        out=out,
        nodes=nodes,
        **options,
    )
    fewest, most = job.nodes
    for count in range(fewest, most + 1):
        check_group(given["group"], model, (), count * job.ranks_per_node)
    return job
