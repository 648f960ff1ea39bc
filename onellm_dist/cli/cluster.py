"""Commands about machines: this one, the nodes of a job, and Slurm."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from onellm_dist.common.errors import UsageError

app = typer.Typer(no_args_is_help=True)


@app.command()
def doctor(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="key=value of the recipe (with --distributed).", metavar="[KEY=VALUE]..."
        ),
    ] = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Look at every node and the links between them.")
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="Its run.dir, data and needs are checked too.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Local ranks, where no launcher started us.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    exclude_file: Annotated[
        Path | None,
        typer.Option(help="Write the bad nodes there, as Slurm's --exclude takes them."),
    ] = None,
    max_skew: Annotated[
        float, typer.Option(min=0, help="Seconds that a clock may be off the nodes' median.")
    ] = 2.0,
    min_bandwidth: Annotated[
        float,
        typer.Option(min=0, help="GB/s of an all-reduce between two nodes; 0: only compare nodes."),
    ] = 0.0,
    min_disk: Annotated[
        float, typer.Option(min=0, help="MB/s of writing to run.dir; 0: only compare nodes.")
    ] = 0.0,
    wait: Annotated[
        float, typer.Option(min=1, help="Seconds to wait for ranks that have not come.")
    ] = 180.0,
    limit: Annotated[float, typer.Option(min=1, help="Most seconds of each check.")] = 60.0,
) -> None:
    """Say what this machine has and what would go wrong: versions, attention kernels, GPUs, launchers; or look at all nodes of a job.

    Examples: onellm doctor
              srun onellm doctor --distributed --recipe stage1_image run.dir=/scratch/stage1 --exclude-file bad_nodes
    """
    if distributed:
        from onellm_dist.diagnostics.preflight.options import Options
        from onellm_dist.diagnostics.preflight.run import run_preflight

        options = Options(
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
        raise typer.Exit(run_preflight(options, local_ranks=ranks))
    if overrides or recipe:
        raise UsageError(
            f"{' '.join(overrides or [str(recipe)])}: a recipe is looked at with --distributed only",
            "nothing was checked.",
            "add --distributed.",
        )
    from onellm_dist.diagnostics.doctor import run_doctor

    raise typer.Exit(run_doctor())


@app.command()
def launch(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe file, or the name of one that ships (stage1_image).")
    ],
    nodes: Annotated[
        str, typer.Option(help="Nodes: 2, or 1-4 for as many of four as there are.")
    ] = "1",
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs, and ranks, a node.")] = 8,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="Where it is not the GPUs' number: runs on CPUs.")
    ] = None,
    starter: Annotated[
        str, typer.Option("--with", help="How ranks start: srun, torchrun or deepspeed (pdsh).")
    ] = "srun",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the recipe (repeatable).")
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="Time limit as Slurm writes it [24:00:00].")
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm quality of service.")] = None,
    exclude: Annotated[
        str | None, typer.Option(help="Nodes to keep away from: gpu[07,12].")
    ] = None,
    cpus_per_rank: Annotated[
        int | None, typer.Option(min=1, help="Cores a rank, to share nodes; default: whole nodes.")
    ] = None,
    container: Annotated[str | None, typer.Option(help="Image to run in.")] = None,
    container_runtime: Annotated[
        str | None, typer.Option(help="pyxis (Enroot) or apptainer [pyxis].")
    ] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(help="A folder that the container sees (repeatable), besides the run's."),
    ] = None,
    max_requeues: Annotated[
        int | None,
        typer.Option(
            min=0, help="Failures in a row, without a new checkpoint, before it halts [5]."
        ),
    ] = None,
    grace_period: Annotated[
        int | None,
        typer.Option(
            help="Seconds of grace period before the time limit; the last save must fit [300]."
        ),
    ] = None,
    preflight: Annotated[
        bool,
        typer.Option(help="Look at every node before the ranks start; keep away from bad ones."),
    ] = False,
    job_name: Annotated[str | None, typer.Option(help="Default: the recipe's name.")] = None,
    python: Annotated[
        str | None, typer.Option(help="The interpreter on the nodes; default: this one.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; default: stdout, or RUN_DIR/job.sbatch with --submit."),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit it, too.")] = False,
) -> None:
    """Render a Slurm job script for a recipe, check it, and submit it on request. It requeues and resumes by itself.

    Examples: onellm launch stage1_image --nodes 2 --gpus-per-node 8 --set run.dir=/scratch/stage1 --submit
              onellm launch tune --nodes 1-4 --with torchrun --time 12:00:00 --partition gpu --out tune.sbatch
    """
    from onellm_dist.launch.slurm.submit import launch_command

    options = {
        "gpus_per_node": gpus_per_node,
        "ranks_per_node": ranks_per_node,
        "starter": starter,
        "time": time,
        "partition": partition,
        "account": account,
        "qos": qos,
        "exclude": exclude,
        "cpus_per_rank": cpus_per_rank,
        "container": container,
        "container_runtime": container_runtime,
        "max_requeues": max_requeues,
        "grace_period_s": grace_period,
        "name": job_name,
        "python": python,
        "mounts": mount or [],
        "preflight": preflight,
    }
    command = shlex.join(["onellm", *sys.argv[1:]])
    raise typer.Exit(
        launch_command(
            recipe, settings or [], nodes=nodes, out=out, submit=submit, command=command, **options
        )
    )


@app.command()
def rehearse(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe file, or the name of one that ships.")
    ] = Path("toy/align_image"),
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the throw-away Slurm.")] = 2,
    ranks_per_node: Annotated[
        int, typer.Option(min=1, help="Ranks a node; all share this machine's cores.")
    ] = 2,
    starter: Annotated[
        str, typer.Option("--with", help="How ranks start: srun, torchrun or deepspeed (pdsh).")
    ] = "srun",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the recipe (repeatable).")
    ] = None,
    preflight: Annotated[
        bool, typer.Option(help="Rehearse the script with the preflight in it.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="A scenario (repeatable); default: all five.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Run directories, logs and job scripts.")] = Path(
        "runs/rehearsal"
    ),
) -> None:
    """Rehearse a recipe at toy size under a real, throw-away Slurm on this machine: its own job script is run clean, preempted, with a
    rank killed, with a node lost, and back at another node count; samples and losses must be those of the clean run.

    Example: onellm rehearse stage1_image --nodes 2 --ranks-per-node 2
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
