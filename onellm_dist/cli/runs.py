"""Commands about runs: make one, train it, and look at what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from onellm_dist.cli.help import format_examples
from onellm_dist.common.errors import UsageError

app = typer.Typer(no_args_is_help=True)
"""Holds commands of `onellm` itself: it is added to the main app without a name."""


@app.command(epilog=format_examples("onellm demo --out demo_run"))
def demo(
    out: Annotated[
        Path, typer.Option(help="Folder for the shards, the runs, the table and the report.")
    ] = Path("demo_run"),
    full: Annotated[
        bool,
        typer.Option("--full", help="Train three times as many steps: about an hour on two cores."),
    ] = False,
) -> None:
    """Run everything once on the toy world: shards, towers, align, tune, captions, report."""
    from onellm_dist.testing.demo.run import run_demo

    raise typer.Exit(run_demo(out, full=full))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": False},
    epilog=format_examples(
        "onellm train toy/align_image data.root=toy launch.ranks=2 run.dir=runs/first",
        "onellm train my_recipe.yaml optim.lr=1e-4 --show",
        "deepspeed --module onellm_dist.train stage1_image run.dir=/scratch/stage1",
    ),
)
def train(
    recipe: Annotated[
        Path | None,
        typer.Argument(
            help="A recipe file, or the name of one that ships (toy/align_image).",
            metavar="RECIPE",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Keys of the recipe to change, with values in YAML: train.steps=10.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    show: Annotated[
        bool,
        typer.Option(
            "--show",
            help="Start nothing: print every key with its value and where that comes from, the "
            "table of parameters, the samples of the first steps, what a run needs and how long it "
            "takes. The exit code is 2 if a start would be refused.",
        ),
    ] = False,
    keys: Annotated[
        bool, typer.Option("--keys", help="Print every key with its type, default and meaning.")
    ] = False,
    schema: Annotated[
        bool,
        typer.Option(
            "--schema", help="Print the JSON schema of recipes, with which editors check them."
        ),
    ] = False,
) -> None:
    """Train a recipe. A restarted run resumes from its latest complete checkpoint.

    Under deepspeed, torchrun or srun, this process is one rank. Without a
    launcher it starts `launch.ranks` local ranks (default: one per GPU).
    """
    if keys or schema:
        if recipe is not None or show or (keys and schema):
            raise UsageError(
                "--keys and --schema are about all recipes",
                "they take no recipe and no other option.",
                "give one of them alone.",
            )
        print(_format_keys() if keys else _format_schema())
        return
    if recipe is None:
        raise UsageError(
            "no RECIPE was given",
            "there is nothing to train.",
            "give a file or the name of a recipe that ships: onellm train toy/align_image.",
        )
    if show:
        raise typer.Exit(_show(recipe, overrides or []))
    raise typer.Exit(_train(recipe, overrides or []))


def _train(recipe: Path, overrides: list[str]) -> int:
    """Train; after local ranks, let the checkpoints answer `data.validation.tasks`."""
    from onellm_dist.common.errors import EXIT_DONE
    from onellm_dist.config.load import load_config
    from onellm_dist.launch.ranks import discover_ranks
    from onellm_dist.train.run import main

    try:
        config = None if discover_ranks() is not None else load_config(recipe, overrides)
    except UsageError:
        return main(recipe, overrides)  # which records the refusal
    section = None if config is None else config.data.validation
    if config is None or section is None or not section.tasks:
        return main(recipe, overrides)
    from onellm_dist.cli.evaluate_run import answer_kept
    from onellm_dist.evaluation.kept_checkpoints import find_data

    find_data(config, section)
    code = main(recipe, overrides)
    return answer_kept(config.run.dir, config.launch.ranks) if code == EXIT_DONE else code


def _show(recipe: Path, overrides: list[str]) -> int:
    from onellm_dist.planner.brief import describe_briefly
    from onellm_dist.train.recipe_summary.command import show_recipe

    return show_recipe(recipe, overrides, describe_plan=describe_briefly)


def _format_keys() -> str:
    from onellm_dist.config.keys import format_key_list

    return format_key_list()


def _format_schema() -> str:
    from onellm_dist.config.json_schema import build_json_schema

    return json.dumps(build_json_schema(), indent=2, ensure_ascii=False)


@app.command(epilog=format_examples("onellm report runs/stage1_image", "onellm report runs/sweep"))
def report(
    run: Annotated[
        Path,
        typer.Argument(
            help="The directory of a run, running or ended; or a folder of runs (a sweep), which "
            "are compared.",
            metavar="RUN",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The HTML page to write.", show_default="RUN/report.html"),
    ] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print the figures as JSON; write a page only with --out."),
    ] = False,
) -> None:
    """Write one HTML page about a run and all its restarts, or about the runs of a sweep.

    The page of a run shows the loss, the goodput, restarts, resume times and
    stalls, and what to look at first. That of a sweep shows what differs
    between its runs, the best first, and their losses.
    """
    from onellm_dist.report.command import run_report

    raise typer.Exit(run_report(run, out, as_json=as_json))


@app.command(
    context_settings={"allow_interspersed_args": True},
    epilog=format_examples(
        "onellm samples runs/stage1_image",
        "onellm samples runs/stage1_image --step 120",
        "onellm samples runs/stage1_image --sample laion400m/00042/000421337",
        "onellm samples exclude runs/stage1_image laion400m/00042/000421337 laion400m/00043",
    ),
)
def samples(
    arguments: Annotated[
        list[str],
        typer.Argument(
            help="The directory of a run, running or ended; or `exclude`, the directory, and the "
            "samples or whole shards to leave out from its next start on.",
            metavar="[exclude] RUN [KEY...]",
        ),
    ],
    step: Annotated[
        int | None, typer.Option(help="Show the samples of this step; the first is 0.")
    ] = None,
    sample: Annotated[
        str | None,
        typer.Option(
            help="Show the steps of this sample: dataset/shard/key, a key, or a beginning of one."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show which samples a step trained on, or which steps train on a sample.

    Without options: how far the run is, and how many of its steps are in a
    checkpoint. With `exclude`: leave samples or whole shards out of the run
    from its next start on; all other samples stay where they are.
    """
    if arguments[0] == "exclude" and len(arguments) > 1:
        from onellm_dist.train.sample_log.exclude import exclude_command

        raise typer.Exit(exclude_command(Path(arguments[1]), arguments[2:]))
    from onellm_dist.train.sample_log.command import samples_command

    if len(arguments) > 1:
        raise UsageError(
            f"{arguments[1]!r} is one argument too many",
            "the samples of one run are shown.",
            "give one run directory; --step or --sample ask about its samples.",
        )
    raise typer.Exit(samples_command(Path(arguments[0]), step, sample, as_json=as_json))
