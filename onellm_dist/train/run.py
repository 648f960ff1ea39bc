"""A start of a run: as a rank of some launcher, or alone (then it starts local ranks itself).

Only this module ends a process. Every start ends with `exit.json`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from onellm_dist.common.errors import EXIT_FAILED, EXIT_USAGE, OneLLMError
from onellm_dist.common.logging import configure_logging, get_logger
from onellm_dist.common.processes import make_module_command
from onellm_dist.common.run_files import EXIT, LOGS
from onellm_dist.config.load import load_config
from onellm_dist.config.schema import RunConfig
from onellm_dist.launch.arguments import decode_argument
from onellm_dist.launch.local import end_with_parent, find_free_port, launch_local
from onellm_dist.launch.ranks import Ranks, check_launch_ranks, discover_ranks
from onellm_dist.train.records.exit_file import ExitFile
from onellm_dist.train.records.run_directory import move_hangs_aside

if TYPE_CHECKING:
    from onellm_dist.train.trainer import Trainer

log = get_logger(__name__)
PRIVATE_UMASK = 0o027


def main(recipe: Path, overrides: Sequence[str] = ()) -> int:
    """Train a recipe.

    It does not return in a process that a launcher started, nor with one local rank.

    Args:
        recipe: a file, or the name of a recipe that ships with the package.
        overrides: `key=value`, each for one key of the recipe.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong usage, 75 preempted after a complete checkpoint.

    Raises:
        UsageError: the recipe is wrong, and no rank was started yet.
    """
    restrict_new_files()
    try:
        ranks = discover_ranks()
        if ranks is not None:
            run_rank(recipe, overrides, ranks)
        config = load_config(recipe, overrides)
        check_before_ranks(config)
    except OneLLMError as error:
        exit_file = ExitFile(find_run_dir(recipe, overrides), rank=0)
        exit_file.clear()
        exit_file.write_failure(error)
        raise
    configure_logging()
    count = config.launch.ranks or _count_gpus() or 1
    if count == 1:
        run_rank(recipe, overrides, Ranks(0, 1, 0, 1, "127.0.0.1", find_free_port()))
    command = make_module_command("onellm_dist.train", str(recipe), *overrides)
    code = launch_local(command, count, config.run.dir / LOGS)
    if code and not (config.run.dir / EXIT).exists():
        reason = f"a rank ended before it could say why (exit code {code}); see {LOGS}/"
        ExitFile(config.run.dir, rank=0).write("failed", reason=reason)
    return code


def run_rank(recipe: Path, overrides: Sequence[str], ranks: Ranks) -> NoReturn:
    """Be one rank, from reading the recipe to the end of the process.

    Args:
        recipe: see `main`.
        overrides: see `main`.
        ranks: this process's place among the ranks.
    """
    end_with_parent()
    restrict_new_files()
    configure_logging(rank=ranks.rank, world_size=ranks.world_size)
    exit_file = ExitFile(find_run_dir(recipe, overrides), rank=ranks.rank)
    if ranks.rank == 0:
        exit_file.clear()
        move_hangs_aside(exit_file.run_dir)
    trainer: Trainer | None = None
    try:
        config = load_config(recipe, overrides)
        typed = any(item.startswith("launch.ranks=") for item in overrides)
        check_launch_ranks(config.launch.ranks, ranks, typed=typed)
        trainer = _build_trainer(config, ranks, exit_file)
        code = trainer.fit().exit_code
    except OneLLMError as error:
        log.error("%s", error)
        code = exit_file.write_failure(error)
    except Exception as error:
        log.error("%s", traceback.format_exc())
        code = exit_file.write_failure(error)
    if code == EXIT_FAILED and trainer is not None:
        trainer.checkpoints.drain()
    end_process(code)


def _build_trainer(config: RunConfig, ranks: Ranks, exit_file: ExitFile) -> Trainer:
    from onellm_dist.train.callbacks.startup_timing import StartupTiming
    from onellm_dist.train.session import ProcessContext
    from onellm_dist.train.trainer import Trainer

    timing = StartupTiming(exit_file.heartbeat)
    timing.measure_imports()
    process = ProcessContext(exit_file, timing, end=os._exit)
    return Trainer.from_config(config, ranks=ranks, process=process)


def restrict_new_files() -> None:
    """Let the files of this process be read by its user and group alone.

    Recipes, events and samples say more about people and their data than others need to know.
    """
    os.umask(os.umask(PRIVATE_UMASK) | PRIVATE_UMASK)


def end_process(code: int) -> NoReturn:
    """Flush and leave without Python's clean-up.

    gloo's threads abort in that clean-up in a fifth to a half of runs (torch 2.13, 2.15).
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a terminal that is gone, a full disk
            stream.flush()
    os._exit(code)


def check_before_ranks(config: RunConfig) -> None:
    """Refuse what can be refused in a second, before ranks spend ten on their imports.

    Raises:
        UsageError: the recipe names an engine, optimizer or tracker that does not exist or fit.
    """
    from onellm_dist.train.engine.select import get_engine
    from onellm_dist.train.optim.optimizers import check_optim

    if config.track.trackers:
        from onellm_dist.train.callbacks.trackers import check_trackers

        check_trackers(config.track)
    get_engine(config.engine.name).check(config.engine, bf16=config.train.precision == "bf16")
    check_optim(config.optim)


def find_run_dir(recipe: Path, overrides: Sequence[str]) -> Path:
    """`run.dir`, also where the recipe is wrong elsewhere: `exit.json` must have a place."""
    import yaml

    from onellm_dist.config.load import find_recipe
    from onellm_dist.config.schema import RunSection

    for item in reversed(overrides):
        key, _, value = item.partition("=")
        if key == "run.dir" and value:
            return Path(value)
    try:
        return Path(yaml.safe_load(find_recipe(recipe).read_text(encoding="utf-8"))["run"]["dir"])
    except (OneLLMError, OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return RunSection().dir


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
        print(
            "usage: python -m onellm_dist.train RECIPE [key=value ...]\n"
            "example: deepspeed --num_accelerators 2 --module onellm_dist.train toy/align_image "
            "run.dir=runs/first"
        )
        return 0 if given else EXIT_USAGE
    try:
        return main(Path(given[0]), given[1:])
    except OneLLMError as error:
        print(f"onellm: {error}", file=sys.stderr)
        return error.exit_code
