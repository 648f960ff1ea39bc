"""Where `onellm launch` starts a run, and which of its options have a meaning there."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from onellm_dist.common.errors import UsageError

if TYPE_CHECKING:
    from onellm_dist.launch.cloud.job import CloudTarget
    from onellm_dist.launch.slurm.job import SlurmJob

SLURM = "slurm"
SLURM_ONLY = {
    "array": "--array",
    "gpu": "--gpu",
    "time": "--time",
    "partition": "--partition",
    "account": "--account",
    "qos": "--qos",
    "exclude": "--exclude",
    "container_runtime": "--container-runtime",
    "mount": "--mount",
    "preflight": "--preflight",
    "submit": "--submit",
}
"""Options that only Slurm knows."""
CLOUD_ONLY = {"accelerator": "--accelerator", "volume": "--volume"}
COMMANDS = {"kubernetes": "kubectl apply -f", "skypilot": "sky jobs launch"}


def check_options(context: typer.Context, target: str) -> None:
    """Refuse options that have no meaning where the run is to start.

    Raises:
        UsageError: one was given, or the target is unknown.
    """
    if target not in (SLURM, *COMMANDS):
        raise UsageError(
            f"--to {target} is unknown",
            "nothing was rendered.",
            f"use one of: {', '.join((SLURM, *COMMANDS))}.",
        )
    wrong = dict(CLOUD_ONLY if target == SLURM else SLURM_ONLY)
    if target != "skypilot":
        wrong["accelerator"] = "--accelerator"
    if target != SLURM and context.params["starter"] != "torchrun":
        wrong["starter"] = "--with"
    given = [
        option
        for name, option in wrong.items()
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise UsageError(
            f"{', '.join(given)}: not with --to {target}",
            "it would have no effect.",
            "remove it"
            + (", or write what you need into the rendered file." if target != SLURM else "."),
        )


def check_evaluation(params: Mapping[str, Any]) -> None:
    """Refuse options of recipes beside --evaluate, and arguments of evaluations without it.

    Raises:
        UsageError: there are some.
    """
    if not params["evaluate"]:
        if params["arguments"]:
            raise UsageError(
                f"unexpected: {' '.join(params['arguments'])}",
                "a job trains one recipe.",
                "change keys with --set KEY=VALUE; for an evaluation, add --evaluate.",
            )
        return
    given = {"--set": params["settings"], "--array": params["array"], "--gpu": params["gpu"]}
    given[f"--to {params['to']}"] = params["to"] != SLURM
    if unused := [option for option, value in given.items() if value]:
        raise UsageError(
            f"--evaluate with {unused[0]}",
            "an evaluation has no recipe, and is a Slurm job.",
            "write what `onellm evaluate` takes behind `--`.",
        )


def make_evaluation(params: Mapping[str, Any]) -> SlurmJob:
    """Make the job of `onellm launch --evaluate` from its options."""
    from onellm_dist.cli.launch_evaluation import make_job_of_evaluation

    arguments = [str(params["recipe"]), *(params["arguments"] or [])]
    return make_job_of_evaluation(arguments, params["nodes"], _list_slurm_fields(params))


def make_slurm_job(params: Mapping[str, Any]) -> SlurmJob:
    """Make the job of `onellm launch --to slurm` from its options."""
    from onellm_dist.launch.slurm.submit import make_job

    recipe, settings = params["recipe"], params["settings"] or []
    fields = _list_slurm_fields(params)
    array = params["array"] or []
    job = make_job(recipe, settings, nodes=params["nodes"], array=array, **fields)
    if job.evaluates:
        _check_tasks(recipe, settings)
    return job


def _list_slurm_fields(params: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a Slurm job that the options set."""
    same = (
        "gpus_per_node",
        "ranks_per_node",
        "starter",
        "time",
        "partition",
        "account",
        "qos",
        "exclude",
        "cpus_per_rank",
        "container",
        "container_runtime",
        "max_requeues",
        "python",
        "preflight",
    )
    return {
        "grace_period_s": params["grace_period"],
        "name": params["job_name"],
        "mounts": params["mount"] or [],
        "command": _get_command(),
        **{name: params[name] for name in same},
    }


def _check_tasks(recipe: Path, settings: Sequence[str]) -> Path | None:
    """Check the names in `data.validation.tasks`; their datasets may be built later.

    Returns:
        The run directory; None where there are no tasks.

    Raises:
        UsageError: one is unknown.
    """
    from onellm_dist.config.load import load_config
    from onellm_dist.evaluation.tasks import get_task

    config = load_config(recipe, settings)
    section = config.data.validation
    if section is None or not section.tasks:
        return None
    for name in section.tasks:
        get_task(name)
    return config.run.dir


def warn_of_tasks(run_dirs: Sequence[Path], why: str) -> None:
    """Say on stderr that nothing will answer `data.validation.tasks`, and what would.

    Args:
        run_dirs: the run directories.
        why: why nothing will.
    """
    print(f"onellm launch: data.validation.tasks are not answered: {why}", file=sys.stderr)
    for run_dir in run_dirs:
        command = f"onellm evaluate-run {shlex.quote(str(run_dir))}"
        print(f"onellm launch: where the run is, once it is done: {command}", file=sys.stderr)


def write_cloud_file(params: Mapping[str, Any], target: str, out: Path | None) -> None:
    """Render the file of a job for Kubernetes or SkyPilot, and print or write it."""
    from onellm_dist.launch.cloud.job import make_cloud_job
    from onellm_dist.launch.cloud.jobset import render_jobset
    from onellm_dist.launch.cloud.skypilot import render_task

    same = (
        "gpus_per_node",
        "ranks_per_node",
        "cpus_per_rank",
        "accelerator",
        "max_requeues",
        "python",
    )
    job = make_cloud_job(
        params["recipe"],
        params["settings"] or [],
        target=cast("CloudTarget", target),
        nodes=params["nodes"],
        volumes=params["volume"] or [],
        container=params["container"],
        grace_period_s=params["grace_period"],
        name=params["job_name"],
        command=_get_command(),
        **{name: params[name] for name in same},
    )
    run_dir = _check_tasks(params["recipe"], params["settings"] or [])
    if run_dir is not None:
        warn_of_tasks([run_dir], f"--to {target} has no job for them")
    text = render_jobset(job) if target == "kubernetes" else render_task(job)
    if out is None:
        print(text, end="")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"written: {out}")
    print(f"start it: {COMMANDS[target]} {shlex.quote(str(out))}")


def _get_command() -> str:
    return shlex.join(["onellm", *sys.argv[1:]])
