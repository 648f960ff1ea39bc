"""`onellm evaluate-run`: the kept checkpoints of a run answer `data.validation.tasks`.

`onellm train` does it after local ranks, and job scripts submit a job of it.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onellm_dist.cli.evaluate import recording_failures
from onellm_dist.cli.help import format_examples
from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, UsageError
from onellm_dist.common.run_files import EVALUATION

if TYPE_CHECKING:
    from onellm_dist.config.schema import RunConfig, ValidationSection

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


def list_left(run: Path) -> list[tuple[str, Path]]:
    """The checkpoints without scores, the oldest first: name with checksum, and folder.

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

    keeping = load_run(run)[0].checkpoint
    found = list_checkpoints(run / CHECKPOINTS)
    kept = select_permanent(found, keeping.keep_every, keeping.keep_every_hours)
    if found and read_json(run / EXIT).get("status") == "done":
        kept.add(found[-1])
    recorded, left = list_recorded(run), []
    for folder in found:
        manifest = read_manifest(folder) if folder in kept else None
        if manifest is not None:
            name = f"{folder.name}-{str(manifest['content_sha256'])[:8]}"
            if name not in recorded:
                left.append((name, folder))
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
    from onellm_dist.evaluation.kept_checkpoints import find_data

    config, section = load_run(run)
    data = find_data(config, section)
    for name, folder in list_left(run):
        code = _evaluate(run, config, section, name, folder, data, ranks or _count_gpus())
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
    name: str,
    folder: Path,
    data: Path,
    ranks: int,
) -> int:
    """Convert a checkpoint, let it answer, record its scores, and remove the model."""
    from onellm_dist.cli.convert_commands import run_convert
    from onellm_dist.evaluation.kept_checkpoints import (
        append_entry,
        build_entry,
        get_folder,
        list_charts,
    )
    from onellm_dist.evaluation.score import score_folder, write_scores
    from onellm_dist.evaluation.score_page import format_scores, write_score_page
    from onellm_dist.train.checkpoint.folder import parse_name
    from onellm_dist.train.records.run_directory import is_in_use
    from onellm_dist.train.score_tracking import track_scores

    started, out = time.monotonic(), get_folder(run, name)
    model = out / "model"
    out.mkdir(parents=True, exist_ok=True)
    if not model.exists():  # it gets its name once it is whole
        run_convert("run", folder, model, None, {}, workers=None, overwrite=False)
    limit = [] if section.tasks_limit is None else ["--limit", str(section.tasks_limit)]
    options = ["--data", str(data), "--out", str(out), "--any-count", *limit]
    code = _start_evaluate([str(model), *section.tasks, *options], ranks, out)
    if code != EXIT_DONE:
        return code
    scores = score_folder(out, tasks=section.tasks)
    typer.echo(f"{name}\n{format_scores(scores)}")
    write_scores(out, scores)
    write_score_page(out, scores)
    entry = build_entry(name, parse_name(folder), scores, time.monotonic() - started)
    append_entry(run, entry, alone=not is_in_use(run))
    track_scores(config, list_charts(entry), int(entry["steps_done"]) - 1)
    shutil.rmtree(model)
    return EXIT_DONE


def _start_evaluate(arguments: list[str], ranks: int, out: Path) -> int:
    """Run `onellm evaluate` as local ranks."""
    from onellm_dist.common.processes import make_module_command, make_safe_environment
    from onellm_dist.launch.local import launch_local

    command = make_module_command("onellm_dist.cli", "evaluate", *arguments)
    return launch_local(command, ranks, out / "logs", make_safe_environment())


if __name__ == "__main__":
    from onellm_dist.cli import main

    main(["evaluate-run", *sys.argv[1:]])
