"""A start of a run: as a rank of some launcher, or alone (then it starts local ranks itself).

Only this module ends a process. Every start ends with `exit.json`.
"""

from __future__ import annotations

import errno
import os
import tempfile
import traceback
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from onellm_dist.common.errors import EXIT_FAILED, EXIT_USAGE, OneLLMError
from onellm_dist.common.files import FileStamp, stamp_file
from onellm_dist.common.garbage import leave_imports_uncollected
from onellm_dist.common.logging import configure_logging, get_logger
from onellm_dist.common.output import write_error, write_output
from onellm_dist.common.patient_stream import drain_output, patient_output, replace_output
from onellm_dist.common.processes import make_module_command, make_safe_environment
from onellm_dist.common.refusals import START_VARIABLE, describe_start, was_refused
from onellm_dist.common.run_files import EXIT, LOGS
from onellm_dist.config.load import find_run_dir
from onellm_dist.config.schema import RunConfig
from onellm_dist.launch.arguments import decode_argument
from onellm_dist.launch.local import end_with_parent, find_free_port, launch_local
from onellm_dist.launch.rank_logs import LOGS_VARIABLE, keep_logs
from onellm_dist.launch.ranks import Ranks, check_launch_ranks, discover_ranks
from onellm_dist.train.records.applied_resumes import LOCAL_RESTARTS_VARIABLE
from onellm_dist.train.records.budget_file import count_lowerings
from onellm_dist.train.records.exit_file import ExitFile, is_of_refused_start
from onellm_dist.train.records.run_directory import is_in_use, lock_directory
from onellm_dist.train.start.recipe_check import load_checked_config

if TYPE_CHECKING:
    from onellm_dist.train.trainer import Trainer

log = get_logger(__name__)
PRIVATE_UMASK = 0o027
DISK_FAULTS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM)
)
"""Errors of a disk that is full, read-only, gone, or not the user's."""


def main(recipe: Path, overrides: Sequence[str] = ()) -> int:
    """Train a recipe.

    It does not return in a process that a launcher started, nor with one local rank whose token
    budgets are numbers.

    Args:
        recipe: a file, or the name of a recipe that ships with the package.
        overrides: `key=value`, each for one key of the recipe.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage, 75 preempted after a complete checkpoint.

    Raises:
        UsageError: the recipe is wrong, and no rank was started yet.
        RunInUseError: the same, because another start of the run is still running.
    """
    restrict_new_files()
    try:
        ranks = discover_ranks()
        if ranks is not None:
            run_rank(recipe, overrides, ranks)
        config = load_checked_config(recipe, overrides)
        count = config.launch.ranks or _count_gpus() or 1
        if count > 1:  # their logs replace those of an earlier start, which must have ended
            lock_directory(config.run.dir).close()
    except OneLLMError as error:
        ExitFile(find_run_dir(recipe, overrides), rank=0).write_failure(error)
        raise
    configure_logging()
    section = config.data.validation
    answers = section is not None and bool(section.tasks)  # checkpoints, after the training
    if count == 1 and not config.data.finds_budgets and not answers:
        # else somebody must start the rank again, or continue when it has ended
        run_rank(recipe, overrides, Ranks(0, 1, 0, 1, "127.0.0.1", find_free_port()))
    return _run_local_ranks(recipe, overrides, config.run.dir, count)


def _run_local_ranks(recipe: Path, overrides: Sequence[str], run_dir: Path, count: int) -> int:
    """Start the ranks on this machine, and again whenever they have lowered the token budgets."""
    restarts = 0
    while True:
        lowered = count_lowerings(run_dir)
        code = _run_local_start(recipe, overrides, run_dir, count, restarts)
        if not code or count_lowerings(run_dir) <= lowered:
            return code
        restarts += 1
        log.warning("the token budgets are lower now: the run starts again (%d)", restarts)


def _run_local_start(
    recipe: Path, overrides: Sequence[str], run_dir: Path, count: int, restarts: int
) -> int:
    """Start the ranks once, wait for them, and record what none of them could."""
    command = make_module_command("onellm_dist.train", str(recipe), *overrides)
    start, earlier = uuid.uuid4().hex, stamp_file(run_dir / EXIT)
    env = make_safe_environment() | {
        START_VARIABLE: start,
        LOGS_VARIABLE: str((run_dir / LOGS).absolute()),
        LOCAL_RESTARTS_VARIABLE: str(restarts),
    }
    with tempfile.TemporaryDirectory(prefix="onellm-logs-") as folder:
        with patient_output():
            code = launch_local(command, count, Path(folder), env)
        # A refused start has changed nothing; another start may be using the directory.
        if code and not was_refused(run_dir, start, since=0) and not is_in_use(run_dir):
            keep_logs(Path(folder), run_dir / LOGS)
            write_missing_exit(run_dir, code, earlier)
    return code


def write_missing_exit(run_dir: Path, code: int, earlier: FileStamp | None) -> None:
    """Record that local ranks failed, where none of them could.

    Args:
        run_dir: the run directory.
        code: the exit code of the ranks.
        earlier: the `exit.json` before they were started; it says nothing about them.
    """
    path = run_dir / EXIT
    if stamp_file(path) in (None, earlier) or is_of_refused_start(path):
        reason = f"a rank ended before it could say why (exit code {code}); see {LOGS}/"
        exit_file = ExitFile(run_dir, rank=0)
        exit_file.hold(earlier)
        exit_file.write("failed", reason=reason)


def run_rank(recipe: Path, overrides: Sequence[str], ranks: Ranks) -> NoReturn:
    """Be one rank, from reading the recipe to the end of the process.

    Args:
        recipe: see `main`.
        overrides: see `main`.
        ranks: this process's place among the ranks.
    """
    end_with_parent()
    restrict_new_files()
    replace_output()
    configure_logging(rank=ranks.rank, world_size=ranks.world_size)
    start = describe_start(ranks.address, ranks.port, os.environ)
    exit_file = ExitFile(find_run_dir(recipe, overrides), rank=ranks.rank, start=start)
    trainer: Trainer | None = None
    try:
        config = load_checked_config(recipe, overrides)
        typed = any(item.startswith("launch.ranks=") for item in overrides)
        check_launch_ranks(config.launch.ranks, ranks, typed=typed)
        trainer = _build_trainer(config, ranks, exit_file)
        code = trainer.fit().exit_code
    except OneLLMError as error:
        log.error("%s", error)
        code = exit_file.write_failure(error)
    except Exception as error:
        log.error("%s", describe_disk_fault(error) or traceback.format_exc())
        code = exit_file.write_failure(error)
    if code == EXIT_FAILED and trainer is not None:
        trainer.checkpoints.drain()
    end_process(code)


def _build_trainer(config: RunConfig, ranks: Ranks, exit_file: ExitFile) -> Trainer:
    with leave_imports_uncollected():
        from onellm_dist.train.callbacks.startup_timing import StartupTiming
        from onellm_dist.train.start.session import ProcessContext
        from onellm_dist.train.trainer import Trainer

    timing = StartupTiming(exit_file.heartbeat)
    timing.measure_imports()
    process = ProcessContext(exit_file, timing, end=end_process)
    return Trainer.from_config(config, ranks=ranks, process=process)


def restrict_new_files() -> None:
    """Let the files of this process be read by its user and group alone.

    Recipes, events and samples say more about people and their data than others need to know.
    """
    os.umask(os.umask(PRIVATE_UMASK) | PRIVATE_UMASK)


def describe_disk_fault(error: BaseException) -> str:
    """An error of the disk in words; "" for any other error."""
    if not isinstance(error, OSError) or error.errno not in DISK_FAULTS or not error.filename:
        return ""
    return (
        f"{error.filename}: {error.strerror}\n"
        "the run cannot record what it does there.\n"
        "free space or repair the disk, and start the run again: it resumes from its latest "
        "checkpoint."
    )


def end_process(code: int) -> NoReturn:
    """Flush and leave without Python's clean-up.

    gloo's threads abort in that clean-up in a fifth to a half of runs (torch 2.13, 2.15).
    """
    drain_output()
    os._exit(code)


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def drop_launcher_arguments(arguments: Sequence[str]) -> list[str]:
    """Remove `--local_rank=N`, which the `deepspeed` launcher adds (the environment has it too)."""
    return [a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))]


def run_command_line(arguments: Sequence[str]) -> int:
    """Run `python -m onellm_dist.train RECIPE [key=value ...]`; return the exit code."""
    given = [decode_argument(argument) for argument in drop_launcher_arguments(arguments)]
    if not given or given[0] in ("-h", "--help"):
        write_output(
            "usage: python -m onellm_dist.train RECIPE [key=value ...]\n"
            "example: deepspeed --num_accelerators 2 --module onellm_dist.train toy/align_image "
            "run.dir=runs/first"
        )
        return 0 if given else EXIT_USAGE
    try:
        return main(Path(given[0]), given[1:])
    except OneLLMError as error:
        write_error(f"onellm: {error}")
        return error.exit_code
