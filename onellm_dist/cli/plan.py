"""The command that predicts a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onellm_dist.cli.help import format_examples
from onellm_dist.common.errors import UsageError

app = typer.Typer(no_args_is_help=True)
"""Holds a command of `onellm` itself: it is added to the main app without a name."""


Recipe = Annotated[
    Path | None,
    typer.Argument(
        help="A recipe file, or the name of one that ships (stage1_image).", metavar="RECIPE"
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Keys of the recipe to change.", metavar="KEY=VALUE")
]
Nodes = Annotated[int, typer.Option(min=1, help="Nodes of the job.")]
GpusPerNode = Annotated[
    int | None,
    typer.Option(
        min=1, help="GPUs of a node.", show_default="8; with --here: those of this machine"
    ),
]
Gpu = Annotated[
    str | None,
    typer.Option(
        help="Kind of GPU: a100-80, h100-80, h200, or one that was measured.", show_default=False
    ),
]
Here = Annotated[bool, typer.Option("--here", help="Plan for the GPUs of this machine.")]
Network = Annotated[
    float | None,
    typer.Option(
        min=0.01,
        help="GB/s of a node's network links together (100 Gb/s Ethernet: 12.5).",
        show_default="8 NICs of the GPU's generation",
    ),
]
TextTokens = Annotated[
    int | None,
    typer.Option(
        min=1, help="Mean text tokens of a sample.", show_default="17 captions, 224 conversations"
    ),
]
Modalities = Annotated[
    list[str] | None,
    typer.Option(
        help="What the samples of a dataset that is not there have (repeatable).",
        metavar="DATASET=MODALITY",
    ),
]
Search = Annotated[
    bool,
    typer.Option(
        "--search",
        help="Find token budgets, recomputation and engine that fit and go fastest; plan those.",
    ),
]
Write = Annotated[
    Path | None,
    typer.Option(
        help="New recipe file for what --search finds, based on RECIPE; with --calibrate: file for "
        "the constants."
    ),
]
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="Measure the constants of this machine's GPU (or its processors) in two minutes; "
        "--here and --gpu use them from then on.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")]


@app.command(
    epilog=format_examples(
        "onellm plan stage1_image --nodes 2 --gpus-per-node 8 --gpu h100 model.preset=onellm-7b",
        "onellm plan --calibrate",
        "onellm plan tune --here --search --write tune_here.yaml",
    )
)
def plan(
    recipe: Recipe = None,
    overrides: Overrides = None,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = None,
    gpu: Gpu = None,
    here: Here = False,
    network: Network = None,
    text_tokens: TextTokens = None,
    modalities: Modalities = None,
    search: Search = False,
    write: Write = None,
    as_json: AsJson = False,
    calibrate: Calibrate = False,
) -> None:
    """Predict what a run needs and how long it takes.

    The plan has memory by part, samples/s, MFU, traffic, hours and energy.

    Nothing is started, and neither data nor a GPU is needed. The exit code is
    1 if the run would not fit into the memory of its GPUs.
    """
    if calibrate:
        raise typer.Exit(_calibrate(recipe, write))
    if recipe is None:
        raise UsageError(
            "no RECIPE was given",
            "there is nothing to plan.",
            "give a file or the name of a recipe that ships: onellm plan stage1_image --gpu h100.",
        )
    from onellm_dist.planner.command import PlanOptions, run_plan

    options = PlanOptions(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=gpu,
        here=here,
        network_gb_s=network,
        text_tokens=text_tokens,
        modalities=tuple(modalities or ()),
        as_json=as_json,
        search=search,
        write=write,
    )
    raise typer.Exit(run_plan(recipe, overrides or [], options))


def _calibrate(recipe: Path | None, out: Path | None) -> int:
    if recipe is not None:
        raise UsageError(
            f"--calibrate measures this machine, and {recipe} is a recipe",
            "its constants depend on no recipe.",
            "run onellm plan --calibrate first, and then the plan with --here.",
        )
    from onellm_dist.planner.calibrate import run_calibration

    return run_calibration(out=out)
