"""Commands about machines: this one, the nodes of a job, and Slurm."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onellm_dist.cli import launch_options as options
from onellm_dist.cli import launch_targets
from onellm_dist.cli.help import format_examples
from onellm_dist.common.errors import UsageError

if TYPE_CHECKING:
    from onellm_dist.launch.slurm.job import SlurmJob

app = typer.Typer(no_args_is_help=True)
"""Holds commands of `onellm` itself: it is added to the main app without a name."""

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Keys of the recipe to change (with --distributed).", metavar="KEY=VALUE"),
]
Distributed = Annotated[
    bool, typer.Option("--distributed", help="Check every node and the links between them.")
]
CheckedRecipe = Annotated[
    Path | None, typer.Option(help="Also check what this recipe needs: run.dir, data and memory.")
]
LocalRanks = Annotated[
    int | None,
    typer.Option(min=1, help="Local ranks to start if no launcher started this process."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ExcludeFile = Annotated[
    Path | None, typer.Option(help="File for the bad nodes, in the form of Slurm's --exclude.")
]
MaxSkew = Annotated[
    float, typer.Option(min=0, help="Seconds that a clock may differ from the nodes' median.")
]
MinBandwidth = Annotated[
    float,
    typer.Option(
        min=0,
        help="GB/s that an all-reduce between two nodes must reach; 0: only compare the nodes.",
    ),
]
MinDisk = Annotated[
    float,
    typer.Option(min=0, help="MB/s that writing to run.dir must reach; 0: only compare the nodes."),
]
Wait = Annotated[float, typer.Option(min=1, help="Seconds to wait for ranks that have not joined.")]
Limit = Annotated[float, typer.Option(min=1, help="Seconds that each check may take.")]


@app.command(
    epilog=format_examples(
        "onellm doctor",
        "srun onellm doctor --distributed --recipe stage1_image run.dir=/scratch/stage1 "
        "--exclude-file bad_nodes",
    )
)
def doctor(
    overrides: Overrides = None,
    distributed: Distributed = False,
    recipe: CheckedRecipe = None,
    ranks: LocalRanks = None,
    as_json: AsJson = False,
    exclude_file: ExcludeFile = None,
    max_skew: MaxSkew = 2.0,
    min_bandwidth: MinBandwidth = 0.0,
    min_disk: MinDisk = 0.0,
    wait: Wait = 180.0,
    limit: Limit = 60.0,
) -> None:
    """Check this machine, or every node of a job: versions, attention kernels, GPUs, launchers.

    It says what was found and what would go wrong in a run.
    """
    if distributed:
        from onellm_dist.diagnostics.preflight.options import PreflightOptions
        from onellm_dist.diagnostics.preflight.run import run_preflight

        preflight = PreflightOptions(
            recipe=recipe,
            overrides=tuple(overrides or ()),
            wait=wait,
            limit=limit,
            max_skew=max_skew,
            min_bandwidth=min_bandwidth,
            min_disk=min_disk,
            exclude_file=exclude_file,
            as_json=as_json,
        )
        raise typer.Exit(run_preflight(preflight, local_ranks=ranks))
    if overrides or recipe:
        raise UsageError(
            f"{' '.join(overrides or [str(recipe)])}: a recipe is only checked with --distributed",
            "nothing was checked.",
            "add --distributed.",
        )
    from onellm_dist.diagnostics.doctor import run_doctor

    raise typer.Exit(run_doctor())


@app.command(
    epilog=format_examples(
        "onellm launch stage1_image --nodes 2 --gpu h100 --set run.dir=/scratch/stage1 --submit",
        "onellm launch tune --nodes 1-4 --with torchrun --time 12:00:00 --partition gpu "
        "--out tune.sbatch",
        "onellm launch tune --array optim.lr=1e-5,2e-5 --array run.seed=0,1 --submit",
        "onellm launch stage1_image --to kubernetes --nodes 2 --container IMAGE "
        "--volume shared:/data --set run.dir=/data/stage1 --set data.root=/data/shards "
        "--out stage1.yaml",
        "onellm launch --evaluate --nodes 2 --submit -- runs/tune/model gqa mme --data data "
        "--out evaluation",
    )
)
def launch(
    context: typer.Context,
    recipe: options.RecipeOrModel,
    arguments: options.EvaluateArguments = None,
    evaluate: options.Evaluate = False,
    to: options.Target = "slurm",
    nodes: options.Nodes = "1",
    gpus_per_node: options.GpusPerNode = 8,
    gpu: options.Gpu = None,
    ranks_per_node: options.RanksPerNode = None,
    starter: options.StarterOption = "srun",
    settings: options.Settings = None,
    array: options.Sweep = None,
    time: options.TimeLimit = "24:00:00",
    partition: options.Partition = None,
    account: options.Account = None,
    qos: options.Qos = None,
    exclude: options.Exclude = None,
    cpus_per_rank: options.CpusPerRank = None,
    accelerator: options.Accelerator = None,
    container: options.Container = None,
    container_runtime: options.Runtime = "pyxis",
    mount: options.Mounts = None,
    volume: options.Volumes = None,
    max_requeues: options.MaxRequeues = 5,
    grace_period: options.GracePeriod = 300,
    preflight: options.Preflight = False,
    job_name: options.JobName = None,
    python: options.Python = None,
    out: options.ScriptFile = None,
    submit: options.Submit = False,
) -> None:
    """Render a Slurm job script for a recipe, check it, and submit it with --submit.

    The job requeues itself after a preemption or a failure, and the run resumes.
    With --array it is one job for each combination of values, each with a run
    directory of its own below `run.dir`. With --to it is a manifest for Kubernetes
    (a JobSet) or a task for SkyPilot, to read, keep and apply. With --evaluate it
    is an evaluation: what stands behind `--` is what `onellm evaluate` takes.
    """
    launch_targets.check_options(context, to)
    launch_targets.check_evaluation(context.params)
    if evaluate:
        _write_job(launch_targets.make_evaluation(context.params), out, submit=submit)
    elif to == launch_targets.SLURM:
        job = launch_targets.make_slurm_job(context.params)
        _warn_by_plan(job, gpu)
        _write_job(job, out, submit=submit)
    else:
        launch_targets.write_cloud_file(context.params, to, out)


def _warn_by_plan(job: SlurmJob, gpu: str | None) -> None:
    """Print on stderr what the planner says of a job on GPUs."""
    from onellm_dist.launch.slurm.job import parse_time_limit

    if gpu is None:
        if job.gpus_per_node:
            hint = "not planned: --gpu h100 would say whether the run fits, and ends in time"
            print(f"onellm launch: {hint}", file=sys.stderr)
        return
    from onellm_dist.planner.job_check import check_job_plan

    lines = check_job_plan(
        job.recipe,
        job.overrides,
        gpu=gpu,
        nodes=job.nodes[0],
        gpus_per_node=job.ranks_per_node,
        limit_s=parse_time_limit(job.time),
    )
    for line in lines:
        print(f"onellm launch: {line}", file=sys.stderr)


def _write_job(job: SlurmJob, out: Path | None, *, submit: bool) -> None:
    """Print the job's script, or write it to a file and submit it."""
    from onellm_dist.common import run_files
    from onellm_dist.launch.slurm.script import render
    from onellm_dist.launch.slurm.submit import check_script, submit_script

    text = render(job)
    print(f"onellm launch: {check_script(text)}", file=sys.stderr)
    if out is None and not submit:
        print(text, end="")
        if job.evaluates:
            run_dirs = [task.run_dir for task in job.sweep] or [job.run_dir]
            launch_targets.warn_of_tasks(run_dirs, "their job is written with --out or --submit")
        return
    path = out or job.run_dir / run_files.JOB_SCRIPT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"written: {path}")
    if job.evaluates:
        _write_kept_jobs(job)
    if submit:
        history = job.run_dir / ("*" if job.sweep else "") / run_files.ATTEMPTS
        print(f"submitted: job {submit_script(path)}; its history goes to {history}")
    else:
        print(f"submit it: sbatch {shlex.quote(str(path))}")


def _write_kept_jobs(job: SlurmJob) -> None:
    """Write the jobs that the job script submits for checkpoints that are kept."""
    from onellm_dist.common import run_files
    from onellm_dist.launch.slurm.script import render
    from onellm_dist.launch.slurm.submit import make_kept_job

    for run_dir in [task.run_dir for task in job.sweep] or [job.run_dir]:
        path = run_dir / run_files.EVALUATION_SCRIPT
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(make_kept_job(job, run_dir)), encoding="utf-8")
        print(f"written: {path}")


@app.command(epilog=format_examples("onellm rehearse stage1_image --nodes 2 --ranks-per-node 2"))
def rehearse(
    recipe: options.Recipe = Path("toy/align_image"),
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the throw-away Slurm.")] = 2,
    ranks_per_node: Annotated[
        int, typer.Option(min=1, help="Ranks on each node; all share this machine's cores.")
    ] = 2,
    starter: options.StarterOption = "srun",
    settings: options.Settings = None,
    preflight: Annotated[
        bool, typer.Option(help="Rehearse the job script with the preflight in it.")
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A scenario to rehearse (repeatable).", show_default="all five"),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the run directories, logs and job scripts.")
    ] = Path("runs/rehearsal"),
) -> None:
    """Rehearse a recipe's job script at toy size under a real, throw-away Slurm on this machine.

    The job runs undisturbed, is preempted, loses a rank, loses a node, and
    comes back on another number of nodes. Each time its samples and losses
    must equal those of the undisturbed run.
    """
    from onellm_dist.testing.slurm_cluster.rehearse import rehearse_command

    raise typer.Exit(
        rehearse_command(
            recipe,
            settings or [],
            nodes=nodes,
            ranks_per_node=ranks_per_node,
            starter=starter,
            out=out,
            only=only or (),
            preflight=preflight,
        )
    )
