"""`onellm evaluate` and `onellm score`: benchmarks answered, and the answers scored."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onellm_dist.cli.evaluate_group import check_group, evaluate_in_group
from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import EXIT_CODES, EXIT_PREEMPTED, OneLLMError, UsageError

if TYPE_CHECKING:
    from onellm_dist.launch.ranks import Ranks
    from onellm_dist.model.adapters.adapter_set import NamedAdapter

app = typer.Typer()
STARTED = time.time()
"""When this process began, in seconds since 1970."""
GraderKey = Annotated[
    str | None,
    typer.Option(
        help="Environment variable with the API's key.",
        show_default="OPENAI_API_KEY for https://api.openai.com, else none",
    ),
]

Adapters = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=DIR",
        help="An adapter of this model, which answers into OUT/NAME. Repeatable; the model alone "
        "then does not answer.",
    ),
]
Group = Annotated[
    int,
    typer.Option(
        min=1,
        help="Ranks that hold one model together, each a share of its weights: for a model that "
        "fits no single GPU.",
    ),
]


def _list_tasks(wanted: bool) -> None:
    if not wanted:
        return
    from onellm_dist.evaluation.tasks import all_tasks

    for task in all_tasks().values():
        typer.echo(f"{task.name:18}{task.summary}")
    raise typer.Exit


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A onellm directory.")],
    tasks: Annotated[list[str], typer.Argument(help="Benchmarks; see --list.")],
    out: Annotated[Path, typer.Option(help="Folder of the answers; an existing one is resumed.")],
    data: Annotated[
        Path, typer.Option(help="Folder of the datasets: data/gqa-eval and so on.")
    ] = Path("data"),
    split: Annotated[
        str | None, typer.Option(help="The split.", show_default="the task's own")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt by name: paper, training, lmms-eval.")
    ] = None,
    prompt_format: Annotated[
        str, typer.Option("--format", help="conversation, chat or raw.")
    ] = "conversation",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N questions.")] = None,
    any_count: Annotated[
        bool, typer.Option("--any-count", help="Accept a dataset that lacks questions.")
    ] = False,
    as_reference: Annotated[
        bool,
        typer.Option("--as-reference", help="Temperature 0.1, top-p 0.75, 128 tokens, as OneLLM."),
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Prompts answered together.")] = 16,
    adapter: Adapters = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Start this many processes on this machine.")
    ] = None,
    group: Group = 1,
    _list: Annotated[
        bool, typer.Option("--list", is_eager=True, callback=_list_tasks, help="List benchmarks.")
    ] = False,
) -> None:
    """Answer benchmarks; the same command again answers what is missing, on any number of ranks.

    Example: onellm evaluate runs/tune/model gqa vqav2 --data data --out evaluation
    """
    from onellm_dist.common.logging import configure_logging
    from onellm_dist.evaluation.tasks import get_task
    from onellm_dist.launch.ranks import discover_ranks

    for name in tasks:
        get_task(name)
    named = _read_adapters(adapter) if adapter else []
    found = discover_ranks()
    if found is not None:
        configure_logging(rank=found.rank, world_size=found.world_size)
    with recording_failures(out, found):
        check_group(group, model, named, found.world_size if found else ranks or 1)
        if ranks is not None and ranks > 1 and found is None:
            _start_ranks(ranks, out)
            return
        asked = {"split": split, "prompt": prompt, "format": prompt_format, "limit": limit}
        options = asked | {"any_count": any_count, "as_reference": as_reference, "batch": batch}
        typer.echo(_answer(model, tasks, data, out, options, found, group, named))


def _answer(
    model: Path,
    tasks: Sequence[str],
    data: Path,
    out: Path,
    options: Mapping[str, Any],
    ranks: Ranks | None,
    group: int,
    adapters: Sequence[NamedAdapter],
) -> str:
    """Answer this process's questions, alone or with the other ranks of its group."""
    from onellm_dist.evaluation.evaluate import EvaluationOptions, evaluate_folder

    asked = EvaluationOptions(**options)
    if group > 1 and ranks is not None:
        return evaluate_in_group(model, tasks, data, out, asked, ranks, group)
    return evaluate_folder(model, tasks, data, out, asked, ranks, adapters)


def _read_adapters(items: Sequence[str]) -> list[NamedAdapter]:
    from onellm_dist.model.adapters.adapter_set import parse_adapters

    return parse_adapters(items)


@contextmanager
def recording_failures(out: Path, ranks: Ranks | None) -> Iterator[None]:
    """Tell the job script, where one began this evaluation, why a rank gave up."""
    from onellm_dist.common.refusals import append_refusal, describe_start
    from onellm_dist.common.run_files import ATTEMPTS

    try:
        yield
    except OneLLMError as error:
        status = {code: name for name, code in EXIT_CODES.items()}[error.exit_code]
        if (out / ATTEMPTS).is_file() and error.exit_code != EXIT_PREEMPTED:
            append_refusal(
                out,
                status=status,
                exit_code=error.exit_code,
                reason=str(error),
                rank=0 if ranks is None else ranks.rank,
                start=describe_start(ranks.address, ranks.port, os.environ) if ranks else "",
                since=STARTED,
            )
        raise


def _start_ranks(ranks: int, out: Path) -> None:
    """Run this command once more in each of several processes."""
    from onellm_dist.common.errors import EXIT_DONE
    from onellm_dist.launch.local import launch_local

    command = [sys.executable, "-m", "onellm_dist.cli", *sys.argv[1:]]
    code = launch_local(command, ranks, out / "logs", independent=True)
    if code != EXIT_DONE:
        raise typer.Exit(code)


@app.command()
def score(
    out: Annotated[
        list[Path], typer.Argument(help="The --out of `onellm evaluate`; two with --compare.")
    ],
    task: Annotated[
        list[str] | None, typer.Option(help="This task alone; may be repeated.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Score what is there, although answers are missing.")
    ] = False,
    without: Annotated[
        Path | None,
        typer.Option(help="A list of question ids, one a line, that are left out."),
    ] = None,
    grader: Annotated[
        str | None,
        typer.Option(help="Base URL of an OpenAI-compatible API whose model scores open answers."),
    ] = None,
    grader_model: Annotated[str | None, typer.Option(help="The model there.")] = None,
    grader_key: GraderKey = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare two evaluations by the paired bootstrap.")
    ] = False,
) -> None:
    """Score answers; needs no model and no GPU.

    Example: onellm score evaluation
    """
    from onellm_dist.evaluation.compare import compare_scores
    from onellm_dist.evaluation.score import read_ids, score_folder, write_scores
    from onellm_dist.evaluation.score_page import (
        format_differences,
        format_scores,
        write_score_page,
    )

    if len(out) != (2 if compare else 1):
        raise UsageError(
            f"{format_count(len(out), 'folder')}{' to compare' if compare else ''}",
            "one evaluation is scored, two are compared.",
            "see onellm score --help.",
        )
    if grader is not None:
        _grade(out, task or (), grader, grader_model, grader_key)
    left_out = read_ids(without) if without is not None else frozenset[str]()
    scores = [
        score_folder(folder, partial=partial, without=left_out, tasks=task or ()) for folder in out
    ]
    if compare:
        typer.echo(format_differences(compare_scores(*scores)))
        return
    typer.echo(format_scores(scores[0]))
    if left_out:
        typer.echo("\nwithout the questions that were left out; all of them:\n")
        typer.echo(format_scores(score_folder(out[0], partial=partial, tasks=task or ())))
        return
    for path in (*write_scores(out[0], scores[0]), write_score_page(out[0], scores[0])):
        typer.echo(str(path))


def _grade(
    out: Sequence[Path], tasks: Sequence[str], url: str, model: str | None, key: str | None
) -> None:
    """Let another model grade the answers that it has not graded yet."""
    from onellm_dist.evaluation.answer_folder import list_task_folders
    from onellm_dist.evaluation.grader import Grader, grade_task

    if model is None:
        raise UsageError(
            "--grader without --grader-model",
            "scores of different models cannot be compared.",
            "name the model.",
        )
    for folder in out:
        for place in list_task_folders(folder):
            if not tasks or place.name in tasks:
                grade_task(place, Grader(url, model, key))
