"""Commands about runs: demo, train, and what they were and are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True)
"""Its commands are commands of `onellm`; so it is with the app of every file here that has no name of its own."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for shards, runs, table and report.")] = Path(
        "demo_run"
    ),
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Three times the quick demo's steps: about an hour on two cores."
        ),
    ] = False,
) -> None:
    """Run the whole path on the toy world: shards, towers, align, tune, captions, report.

    Example: onellm demo --out demo_run
    """
    from onellm_dist.testing.demo.run import run_demo

    raise typer.Exit(run_demo(out, full=full))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})
def train(
    recipe: Annotated[
        Path, typer.Argument(help="A recipe file, or the name of one that ships (toy/align_image).")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, values in YAML: train.steps=10.", metavar="[KEY=VALUE]..."),
    ] = None,
) -> None:
    """Train a recipe: under deepspeed, torchrun or srun, or alone (then `launch.ranks` local ranks are started).

    Example: onellm train toy/align_image data.root=toy launch.ranks=2 run.dir=runs/first
    """
    from onellm_dist.train.run import main as train_main

    raise typer.Exit(train_main(recipe, overrides or []))


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(help="The run.dir of a run, going or ended.", metavar="RUN")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The HTML page to write.  [default: RUN/report.html]")
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the figures as JSON; write a page only with --out."),
    ] = False,
) -> None:
    """Write one HTML page about a run over all its restarts: loss, goodput, restarts, resume time, stalls, what to look at first.

    Example: onellm report runs/stage1_image
    """
    from onellm_dist.report.command import run_report

    raise typer.Exit(run_report(run, out, as_json=as_json))


@app.command()
def samples(
    run: Annotated[Path, typer.Argument(help="A run's directory; the run may be going on.")],
    step: Annotated[
        int | None, typer.Option(help="Which samples this step had; the first is 0.")
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option(
            help="At which steps this sample comes: dataset/shard/key, a key, or a beginning."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show which samples a step trained on, or which steps train on a sample.

    Example: onellm samples runs/stage1_image --step 120
    """
    from onellm_dist.train.sample_log.command import samples_command

    raise typer.Exit(samples_command(run, step, sample, as_json=as_json))
