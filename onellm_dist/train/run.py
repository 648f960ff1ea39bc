"""A start of a run: as a rank of some launcher, or alone (then it starts local ranks itself). Ends with `exit.json`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from onellm_dist.common.errors import EXIT_FAILED, EXIT_USAGE, OneLLMError
from onellm_dist.config.load import load_config
from onellm_dist.config.schema import RunConfig
from onellm_dist.launch.local import end_with_parent, find_free_port, launch_local
from onellm_dist.launch.ranks import Ranks, discover_ranks
from onellm_dist.train.callbacks.watchdog import Watchdog, put_hangs_aside
from onellm_dist.train.records.exit_file import ExitFile, end_process

if TYPE_CHECKING:
    from onellm_dist.train.setup import Run
    from onellm_dist.train.trainer import Outcome

LOGS = "logs"


def main(recipe: Path, overrides: Sequence[str] = ()) -> int:
    """Train a recipe. In a process that a launcher started, and with one local rank, it does not return.

    Returns:
        The exit code: 0 done, 1 failed, 2 usage, 75 preempted after a whole checkpoint.

    Raises:
        UsageError: the recipe is wrong, and no rank was started yet.
    """
    ranks = discover_ranks()
    if ranks is not None:
        run_rank(recipe, overrides, ranks)
    try:
        config = load_config(recipe, overrides)
        _check_before_ranks(config)
    except OneLLMError as error:
        ExitFile(run_dir_of(recipe, overrides), rank=0).replace(
            "usage" if error.exit_code == EXIT_USAGE else "failed", reason=error.what
        )
        raise
    count = config.launch.ranks or _gpus() or 1
    if count == 1:
        run_rank(recipe, overrides, Ranks(0, 1, 0, 1, "127.0.0.1", find_free_port()))
    command = [sys.executable, "-u", "-m", "onellm_dist.train", str(recipe), *overrides]
    return launch_local(command, count, config.run.dir / LOGS)


def run_rank(recipe: Path, overrides: Sequence[str], ranks: Ranks) -> NoReturn:
    """Be one rank, from reading the recipe to the end of the process."""
    end_with_parent()
    exit_file = ExitFile(run_dir_of(recipe, overrides), ranks.rank)
    if ranks.rank == 0:
        exit_file.clear()
        put_hangs_aside(exit_file.run_dir)
    try:
        code = _train(load_config(recipe, overrides), ranks, exit_file)
    except OneLLMError as error:
        _say(ranks, str(error))
        code = exit_file.write(
            "usage" if error.exit_code == EXIT_USAGE else "failed", reason=error.what
        )
    except Exception as error:
        _say(ranks, traceback.format_exc())
        code = exit_file.write("failed", reason=f"{type(error).__name__}: {error}")
    if code == EXIT_FAILED and exit_file.last_act is not None:
        exit_file.last_act()
    end_process(code)


def _train(config: RunConfig, ranks: Ranks, exit_file: ExitFile) -> int:
    from onellm_dist.train.callbacks.startup_timing import Phases
    from onellm_dist.train.distributed import join
    from onellm_dist.train.setup import build_run
    from onellm_dist.train.trainer import train

    phases = Phases(exit_file.in_flight)
    phases.imported()
    with phases.of("process_group"):
        dist = join(ranks, config.stability)
    with Watchdog(config.run.dir, dist.rank, dist.world_size, config.stability, exit_file):
        run = build_run(config, dist, exit_file, phases)
        exit_file.last_act = run.checkpoints.drain
        return _finish(run, train(run))


def _finish(run: Run, outcome: Outcome) -> int:
    """The end of a start that did not fail: the records, and the last meeting of the ranks. Returns the exit code of all."""
    from onellm_dist.train.distributed import leave

    dist, exit_file = run.dist, run.exit_file
    run.metrics.close()
    if run.trackers is not None:
        run.trackers.finish()
    run.events.write(
        "end",
        status=outcome.status,
        steps_done=exit_file.step,
        reason=outcome.reason,
        say=f"{outcome.status}: {outcome.reason}",
    )
    if dist.is_rank_zero:
        run.stop.honoured()
        code = exit_file.write(outcome.status, reason=outcome.reason)
    code = dist.broadcast(code if dist.is_rank_zero else 0)
    leave()
    return code


def _check_before_ranks(config: RunConfig) -> None:
    """What can be refused in a second, before ranks spend ten on their imports."""
    from onellm_dist.train.engine.select import get_engine
    from onellm_dist.train.optim.optimizers import check_optim

    if config.track.trackers:
        from onellm_dist.train.callbacks.trackers import check_trackers

        check_trackers(config.track)

    get_engine(config.engine.name).check(config.engine, bf16=config.train.precision == "bf16")
    check_optim(config.optim)


def run_dir_of(recipe: Path, overrides: Sequence[str]) -> Path:
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


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _say(ranks: Ranks, message: str) -> None:
    prefix = "" if ranks.world_size == 1 else f"rank {ranks.rank}: "
    print(f"{prefix}{message}", file=sys.stderr, flush=True)


def without_launcher_arguments(arguments: Sequence[str]) -> list[str]:
    """The `deepspeed` launcher adds `--local_rank=N` (its environment says the same)."""
    return [a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))]


def command_line(arguments: Sequence[str]) -> int:
    """`python -m onellm_dist.train RECIPE [key=value ...]`."""
    given = without_launcher_arguments(arguments)
    if not given or given[0] in ("-h", "--help"):
        print(
            "usage: python -m onellm_dist.train RECIPE [key=value ...]\n"
            "example: deepspeed --num_accelerators 2 --module onellm_dist.train toy/align_image run.dir=runs/first"
        )
        return 0 if given else EXIT_USAGE
    try:
        return main(Path(given[0]), given[1:])
    except OneLLMError as error:
        print(f"onellm: {error}", file=sys.stderr)
        return error.exit_code
