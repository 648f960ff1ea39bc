"""`onellm evaluate-run`: the kept checkpoints of a run answer `data.validation.tasks`.

`onellm train` does it after local ranks, and job scripts submit a job of it.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from onellm_dist.cli.evaluate import recording_failures
from onellm_dist.cli.help import format_examples
from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, UsageError
from onellm_dist.common.run_files import EVALUATION

if TYPE_CHECKING:
    from onellm_dist.config.schema import RunConfig, ValidationSection
    from onellm_dist.evaluation.score import TaskScore

app = typer.Typer()


@app.command("evaluate-run", epilog=format_examples("onellm evaluate-run runs/tune --ranks 8"))
def evaluate_run(
    run: Annotated[Path, typer.Argument(help="The run directory.", metavar="RUN")],
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Processes on this machine.", show_default="one per GPU"),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Answer nothing: exit with 0 if a checkpoint is left, else 1."
        ),
    ] = False,
) -> None:
    """Answer `data.validation.tasks` with the checkpoints that a run keeps for ever.

    That is, with those of `checkpoint.keep_every` and `keep_every_hours`, and with the last one
    once the run is done. Scores go to `validation.jsonl` and to the trackers. What has been
    answered is not answered again.
    """
    if check:
        raise typer.Exit(EXIT_DONE if list_left(run) else EXIT_FAILED)
    with recording_failures(run / EVALUATION, None):
        code = answer_kept(run, ranks)
    raise typer.Exit(code)


def load_run(run: Path) -> tuple[RunConfig, ValidationSection]:
    """The recipe of a run directory, and its `data.validation`.

    Raises:
        UsageError: there is no recipe, or it names no tasks.
    """
    from onellm_dist.common.run_files import CONFIG
    from onellm_dist.config.load import load_config
    from onellm_dist.evaluation.kept_checkpoints import get_section

    if not (run / CONFIG).is_file():
        raise UsageError(
            f"{run} is not a run directory",
            f"it has no {CONFIG}.",
            "give the run.dir of a run that has started.",
        )
    config = load_config(run / CONFIG, [f"run.dir={run}"])
    section = get_section(config)
    if section is None:
        raise UsageError(
            f"{run / CONFIG}: data.validation.tasks is empty",
            "there is nothing to answer.",
            "use onellm evaluate, or set the key.",
        )
    return config, section


class LeftCheckpoint(NamedTuple):
    """A checkpoint that has tasks to answer."""

    name: str
    """Name of the checkpoint, checksum included."""
    folder: Path
    tasks: list[str]


def list_left(run: Path) -> list[LeftCheckpoint]:
    """The checkpoints that lack scores of tasks, the oldest first.

    Raises:
        UsageError: see `load_run`.
    """
    from onellm_dist.common.run_files import CHECKPOINTS, EXIT
    from onellm_dist.evaluation.kept_checkpoints import list_recorded
    from onellm_dist.launch.slurm.run_progress import read_json
    from onellm_dist.train.checkpoint.folder import (
        list_checkpoints,
        read_manifest,
        select_permanent,
    )

    config, section = load_run(run)
    keeping, found = config.checkpoint, list_checkpoints(run / CHECKPOINTS)
    kept = select_permanent(found, keeping.keep_every, keeping.keep_every_hours)
    if found and read_json(run / EXIT).get("status") == "done":
        kept.add(found[-1])
    recorded, left = list_recorded(run), []
    for folder in found:
        manifest = read_manifest(folder) if folder in kept else None
        if manifest is not None:
            name = f"{folder.name}-{str(manifest['content_sha256'])[:8]}"
            tasks = [task for task in section.tasks if task not in recorded.get(name, ())]
            if tasks:
                left.append(LeftCheckpoint(name, folder, tasks))
    return left


def answer_kept(run: Path, ranks: int | None = None) -> int:
    """Evaluate the checkpoints that are left, one after the other.

    Args:
        run: the run directory.
        ranks: processes on this machine; None: one per GPU.

    Returns:
        The exit code.

    Raises:
        UsageError: see `load_run`; a task is unknown, or its dataset is missing.
    """
    from onellm_dist.evaluation.kept_checkpoints import find_data, remove_answered_models

    config, section = load_run(run)
    data = find_data(config, section)
    remove_answered_models(run)
    for left in list_left(run):
        code = _evaluate(run, config, section, left, data, ranks or _count_gpus())
        if code != EXIT_DONE:
            return code
    return EXIT_DONE


def _count_gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _evaluate(
    run: Path,
    config: RunConfig,
    section: ValidationSection,
    left: LeftCheckpoint,
    data: Path,
    ranks: int,
) -> int:
    """Convert a checkpoint, let it answer, record its scores, and remove the model."""
    from onellm_dist.cli.convert_commands import run_convert
    from onellm_dist.evaluation.kept_checkpoints import (
        ANSWERED_MODEL,
        append_entry,
        build_entry,
        get_folder,
        list_charts,
    )
    from onellm_dist.train.checkpoint.folder import parse_name
    from onellm_dist.train.records.run_directory import is_in_use
    from onellm_dist.train.score_tracking import track_scores

    started, out = time.monotonic(), get_folder(run, left.name)
    model = out / "model"
    out.mkdir(parents=True, exist_ok=True)
    if not model.exists():  # it gets its name once it is complete
        run_convert("run", left.folder, model, None, {}, workers=None, overwrite=False)
    arguments = [str(model), *left.tasks, "--data", str(data), "--out", str(out)]
    code = _start_evaluate([*arguments, *list_options(config, section)], ranks, out)
    if code != EXIT_DONE:
        return code
    scores = _score(left, section, out)
    entry = build_entry(left.name, parse_name(left.folder), scores, time.monotonic() - started)
    # A kill from here on leaves a name by which the next start removes the model.
    answered = model.rename(out / ANSWERED_MODEL)
    append_entry(run, entry, alone=not is_in_use(run))
    shutil.rmtree(answered)
    track_scores(config, list_charts(entry), int(entry["steps_done"]) - 1)
    return EXIT_DONE


def list_options(config: RunConfig, section: ValidationSection) -> list[str]:
    """Options of `onellm evaluate`: questions are asked in the form that the run is trained on."""
    options = ["--any-count"]
    if section.tasks_limit is not None:
        options += ["--limit", str(section.tasks_limit)]
    if config.data.text_format == "chat":
        options += ["--format", "chat"]
    return options


def _score(left: LeftCheckpoint, section: ValidationSection, out: Path) -> list[TaskScore]:
    """Score what was answered, and write the page, with the tasks that were answered before."""
    from onellm_dist.evaluation.answer_folder import list_task_folders
    from onellm_dist.evaluation.score import score_folder, write_scores
    from onellm_dist.evaluation.score_page import format_scores, write_score_page

    there = {folder.name for folder in list_task_folders(out)}
    scores = score_folder(out, tasks=[task for task in section.tasks if task in there])
    typer.echo(f"{left.name}\n{format_scores(scores)}")
    write_scores(out, scores)
    write_score_page(out, scores)
    return [score for score in scores if score.task.name in left.tasks]


def _start_evaluate(arguments: list[str], ranks: int, out: Path) -> int:
    """Run `onellm evaluate` as local ranks."""
    from onellm_dist.common.processes import make_module_command, make_safe_environment
    from onellm_dist.launch.local import launch_local

    command = make_module_command("onellm_dist.cli", "evaluate", *arguments)
    return launch_local(command, ranks, out / "logs", make_safe_environment(), independent=True)


if __name__ == "__main__":
    from onellm_dist.cli import main

    main(["evaluate-run", *sys.argv[1:]])
