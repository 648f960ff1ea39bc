"""Commands about machines: this one, the nodes of a job, and Slurm."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onellm_dist.cli.help import format_examples
from onellm_dist.common.errors import UsageError

if TYPE_CHECKING:
    from onellm_dist.launch.slurm.job import SlurmJob

app = typer.Typer(no_args_is_help=True)
"""Holds commands of `onellm` itself: it is added to the main app without a name."""

Recipe = Annotated[
    Path, typer.Argument(help="A recipe file, or the name of one that ships (stage1_image).")
]
Starter = Annotated[
    str, typer.Option("--with", help="What starts the ranks: srun, torchrun or deepspeed (pdsh).")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A key of the recipe to change, with its value in YAML (repeatable).",
        metavar="KEY=VALUE",
    ),
]


@app.command(
    epilog=format_examples(
        "onellm doctor",
        "srun onellm doctor --distributed --recipe stage1_image run.dir=/scratch/stage1 "
        "--exclude-file bad_nodes",
    )
)
def doctor(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Keys of the recipe to change (with --distributed).", metavar="KEY=VALUE"
        ),
    ] = None,
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Check every node and the links between them.")
    ] = False,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Also check what this recipe needs: its run.dir, data and memory."),
    ] = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Local ranks to start if no launcher started this process."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    exclude_file: Annotated[
        Path | None,
        typer.Option(help="File to write the bad nodes to, in the form of Slurm's --exclude."),
    ] = None,
    max_skew: Annotated[
        float,
        typer.Option(min=0, help="Seconds that a clock may differ from the median of the nodes."),
    ] = 2.0,
    min_bandwidth: Annotated[
        float,
        typer.Option(
            min=0,
            help="GB/s that an all-reduce between two nodes must reach; 0: only compare the nodes.",
        ),
    ] = 0.0,
    min_disk: Annotated[
        float,
        typer.Option(
            min=0, help="MB/s that writing to run.dir must reach; 0: only compare the nodes."
        ),
    ] = 0.0,
    wait: Annotated[
        float, typer.Option(min=1, help="Seconds to wait for ranks that have not joined.")
    ] = 180.0,
    limit: Annotated[float, typer.Option(min=1, help="Seconds that each check may take.")] = 60.0,
) -> None:
    """Check this machine, or every node of a job: versions, attention kernels, GPUs, launchers.

    It says what was found and what would go wrong in a run.
    """
    if distributed:
        from onellm_dist.diagnostics.preflight.options import PreflightOptions
        from onellm_dist.diagnostics.preflight.run import run_preflight

        options = PreflightOptions(
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
            f"{' '.join(overrides or [str(recipe)])}: a recipe is only checked with --distributed",
            "nothing was checked.",
            "add --distributed.",
        )
    from onellm_dist.diagnostics.doctor import run_doctor

    raise typer.Exit(run_doctor())


@app.command(
    epilog=format_examples(
        "onellm launch stage1_image --nodes 2 --set run.dir=/scratch/stage1 --submit",
        "onellm launch tune --nodes 1-4 --with torchrun --time 12:00:00 --partition gpu "
        "--out tune.sbatch",
    )
)
def launch(
    recipe: Recipe,
    nodes: Annotated[str, typer.Option(help="Number of nodes: 2, or 1-4 for up to four.")] = "1",
    gpus_per_node: Annotated[
        int, typer.Option(min=0, help="GPUs on each node; also the ranks on each node.")
    ] = 8,
    ranks_per_node: Annotated[
        int | None,
        typer.Option(
            min=1, help="Ranks on each node, for runs on CPUs.", show_default="--gpus-per-node"
        ),
    ] = None,
    starter: Starter = "srun",
    settings: Settings = None,
    time: Annotated[str, typer.Option(help="Time limit, as Slurm writes it.")] = "24:00:00",
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm quality of service.")] = None,
    exclude: Annotated[
        str | None, typer.Option(help="Nodes to avoid, as Slurm writes lists: gpu07,gpu12.")
    ] = None,
    cpus_per_rank: Annotated[
        int | None,
        typer.Option(min=1, help="Cores of each rank, to share nodes.", show_default="whole nodes"),
    ] = None,
    container: Annotated[
        str | None, typer.Option(help="Container image in which the ranks run.")
    ] = None,
    container_runtime: Annotated[str, typer.Option(help="pyxis (Enroot) or apptainer.")] = "pyxis",
    mount: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder that the container sees, besides the run's and the data's (repeatable)."
        ),
    ] = None,
    max_requeues: Annotated[
        int,
        typer.Option(
            min=0, help="Failures in a row, without a new checkpoint, after which the job halts."
        ),
    ] = 5,
    grace_period: Annotated[
        int,
        typer.Option(
            help="Seconds before the time limit at which the job is asked to stop; the last "
            "checkpoint must fit in."
        ),
    ] = 300,
    preflight: Annotated[
        bool, typer.Option(help="Check every node before the ranks start, and avoid bad ones.")
    ] = False,
    job_name: Annotated[
        str | None, typer.Option(help="Name of the job.", show_default="the recipe's name")
    ] = None,
    python: Annotated[
        str | None,
        typer.Option(help="The Python interpreter on the nodes.", show_default="this one"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write.", show_default="stdout, or RUN_DIR/job.sbatch with --submit"
        ),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the job script.")] = False,
) -> None:
    """Render a Slurm job script for a recipe, check it, and submit it with --submit.

    The job requeues itself after a preemption or a failure, and the run resumes.
    """
    from onellm_dist.launch.slurm.submit import make_job

    job = make_job(
        recipe,
        settings or [],
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        starter=starter,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        exclude=exclude,
        cpus_per_rank=cpus_per_rank,
        container=container,
        container_runtime=container_runtime,
        max_requeues=max_requeues,
        grace_period_s=grace_period,
        name=job_name,
        python=python,
        mounts=mount or [],
        preflight=preflight,
        command=shlex.join(["onellm", *sys.argv[1:]]),
    )
    _write_job(job, out, submit=submit)


def _write_job(job: SlurmJob, out: Path | None, *, submit: bool) -> None:
    """Print the job's script, or write it to a file and submit it."""
    from onellm_dist.common import run_files
    from onellm_dist.launch.slurm.script import render
    from onellm_dist.launch.slurm.submit import check_script, submit_script

    text = render(job)
    print(f"onellm launch: {check_script(text)}", file=sys.stderr)
    if out is None and not submit:
        print(text, end="")
        return
    path = out or job.run_dir / run_files.JOB_SCRIPT
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(f"written: {path}")
    if submit:
        history = job.run_dir / run_files.ATTEMPTS
        print(f"submitted: job {submit_script(path)}; its history goes to {history}")
    else:
        print(f"submit it: sbatch {path}")


@app.command(
    epilog=format_examples("onellm rehearse stage1_image --nodes 2 --ranks-per-node 2"),
)
def rehearse(
    recipe: Recipe = Path("toy/align_image"),
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the throw-away Slurm.")] = 2,
    ranks_per_node: Annotated[
        int, typer.Option(min=1, help="Ranks on each node; all share this machine's cores.")
    ] = 2,
    starter: Starter = "srun",
    settings: Settings = None,
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
