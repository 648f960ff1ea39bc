"""The options of `onellm launch` and `onellm rehearse`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Recipe = Annotated[
    Path, typer.Argument(help="A recipe file, or the name of one that ships (stage1_image).")
]
RecipeOrModel = Annotated[
    Path,
    typer.Argument(
        help="A recipe file, or the name of one that ships (stage1_image); with --evaluate, the "
        "folder of a model."
    ),
]
EvaluateArguments = Annotated[
    list[str] | None,
    typer.Argument(
        help="With --evaluate: the tasks and options of `onellm evaluate`, behind `--`."
    ),
]
Evaluate = Annotated[
    bool, typer.Option("--evaluate", help="A job that answers benchmarks instead of a run.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A key of the recipe to change, with its value in YAML (repeatable).",
        metavar="KEY=VALUE",
    ),
]
Sweep = Annotated[
    list[str] | None,
    typer.Option(
        "--array",
        help="A key and its values: one run for each, as a Slurm array (repeatable: for every "
        "combination).",
        metavar="KEY=VALUE,...",
    ),
]
StarterOption = Annotated[
    str, typer.Option("--with", help="What starts the ranks: srun, torchrun or deepspeed (pdsh).")
]
Target = Annotated[
    str, typer.Option("--to", help="Where the run is to start: slurm, kubernetes or skypilot.")
]
Accelerator = Annotated[
    str | None, typer.Option(help="Kind of GPU, as SkyPilot calls it (with --to skypilot): H100.")
]
Volumes = Annotated[
    list[str] | None,
    typer.Option(
        "--volume",
        help="A shared volume and where the nodes mount it (repeatable; with --to kubernetes: the "
        "name of a PersistentVolumeClaim).",
        metavar="NAME:/PATH",
    ),
]
Nodes = Annotated[str, typer.Option(help="Number of nodes: 2, or 1-4 for up to four.")]
GpusPerNode = Annotated[
    int, typer.Option(min=0, help="GPUs on each node; also the ranks on each node.")
]
Gpu = Annotated[
    str | None,
    typer.Option(
        help="Kind of the GPUs (h100): plan the run on them, and warn if it does not fit their "
        "memory or ends after the time limit.",
        show_default="no plan",
    ),
]
RanksPerNode = Annotated[
    int | None,
    typer.Option(
        min=1, help="Ranks on each node, for runs on CPUs.", show_default="--gpus-per-node"
    ),
]
TimeLimit = Annotated[str, typer.Option(help="Time limit, as Slurm writes it.")]
Partition = Annotated[str | None, typer.Option(help="Slurm partition.")]
Account = Annotated[str | None, typer.Option(help="Slurm account.")]
Qos = Annotated[str | None, typer.Option(help="Slurm quality of service.")]
Exclude = Annotated[
    str | None, typer.Option(help="Nodes to avoid, as Slurm writes lists: gpu07,gpu12.")
]
CpusPerRank = Annotated[
    int | None,
    typer.Option(min=1, help="Cores of each rank, to share nodes.", show_default="whole nodes"),
]
Container = Annotated[str | None, typer.Option(help="Container image in which the ranks run.")]
Runtime = Annotated[str, typer.Option(help="pyxis (Enroot) or apptainer.")]
Mounts = Annotated[
    list[str] | None,
    typer.Option(
        help="A folder that the container sees, besides the run's and the data's (repeatable)."
    ),
]
MaxRequeues = Annotated[
    int,
    typer.Option(
        min=0, help="Failures in a row, without a new checkpoint, after which the job halts."
    ),
]
GracePeriod = Annotated[
    int,
    typer.Option(
        help="Seconds before the time limit at which the job is asked to stop; the last "
        "checkpoint must fit in."
    ),
]
Preflight = Annotated[
    bool, typer.Option(help="Check every node before the ranks start, and avoid bad ones.")
]
JobName = Annotated[
    str | None, typer.Option(help="Name of the job.", show_default="the recipe's name")
]
Python = Annotated[
    str | None,
    typer.Option(
        help="The Python interpreter on the nodes.", show_default="this one; in a container its own"
    ),
]
ScriptFile = Annotated[
    Path | None,
    typer.Option(help="File to write.", show_default="stdout, or RUN_DIR/job.sbatch with --submit"),
]
Submit = Annotated[bool, typer.Option("--submit", help="Submit the job script.")]
