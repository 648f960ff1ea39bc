"""What one start of a run holds in its process until the end."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onellm_dist.common.files import FileStamp
from onellm_dist.common.logging import ROOT, configure_logging
from onellm_dist.common.refusals import describe_start
from onellm_dist.config.schema import RunConfig
from onellm_dist.launch.local import find_free_port
from onellm_dist.launch.rank_logs import move_own_log
from onellm_dist.launch.ranks import Ranks, discover_ranks
from onellm_dist.train.callbacks.preemption import Preemption
from onellm_dist.train.callbacks.startup_timing import StartupTiming
from onellm_dist.train.callbacks.watchdog import HangWatchdog
from onellm_dist.train.distributed import Distributed, process_group
from onellm_dist.train.records.exit_file import ExitFile
from onellm_dist.train.records.run_directory import lock_directory, move_hangs_aside


@dataclass(frozen=True)
class ProcessContext:
    """The process that a start of a run lives in.

    Attributes:
        exit_file: where the end of the start is recorded, also before training is built.
        timing: the start-up timing so far.
        end: ends the process with an exit code, where it must end at once (a hang, a second
            signal); None: the process must not be ended.
    """

    exit_file: ExitFile
    timing: StartupTiming
    end: Callable[[int], Any] | None = None


class Session:
    """The process group, the hang watchdog, the lock of the run directory, and the exit file.

    Args:
        config: the recipe.
        ranks: this process's place in the run; default: what the launcher says, else one rank.
        process: the process; default: one that must not be ended.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        ranks: Ranks | None = None,
        process: ProcessContext | None = None,
    ) -> None:
        self.run_dir: Path = config.run.dir
        self._stack = ExitStack()
        self._preemption: Preemption | None = None
        ranks = ranks or discover_ranks() or Ranks(0, 1, 0, 1, "127.0.0.1", find_free_port())
        if process is None:
            if not logging.getLogger(ROOT).hasHandlers():  # a script or a notebook
                configure_logging(rank=ranks.rank, world_size=ranks.world_size)
            start = describe_start(ranks.address, ranks.port, os.environ)
            exit_file = ExitFile(self.run_dir, rank=ranks.rank, start=start)
            process = ProcessContext(exit_file, StartupTiming(exit_file.heartbeat))
        self.end_process = process.end
        self.exit_file = process.exit_file
        self.heartbeat = process.exit_file.heartbeat
        self.timing = process.timing
        with self.timing.measure("process_group"):
            self.dist: Distributed = self._stack.enter_context(
                process_group(ranks, config.stability)
            )
        self.watchdog = HangWatchdog(
            self.run_dir,
            rank=self.dist.rank,
            world_size=self.dist.world_size,
            config=config.stability,
            exit_file=self.exit_file,
            end_process=self.end_process,
        )
        self._stack.callback(self.watchdog.close)
        self.watchdog.start()

    def lock(self) -> None:
        """Hold the run directory, on rank 0. All ranks call it together.

        Raises:
            RunInUseError: another start of the run is still running.
            UsageError: the directory cannot be made or written to.
        """

        def take() -> FileStamp | None:
            self._stack.enter_context(lock_directory(self.run_dir))
            return self.exit_file.find_earlier()

        self.exit_file.hold(self.dist.ask_rank_zero(take))

    def begin(self, prepare: Callable[[], None]) -> None:
        """Make the run directory that of this start. All ranks call it together.

        Args:
            prepare: called on rank 0: changes what is in the directory.
        """

        def clear() -> None:
            prepare()
            move_hangs_aside(self.run_dir)
            self.exit_file.remove_earlier()
            if self._preemption is not None:
                self._preemption.discard_earlier()

        self.dist.ask_rank_zero(clear)
        self.exit_file.begin()
        move_own_log()

    def listen(self) -> Preemption:
        """Listen for requests to stop."""
        self._preemption = Preemption(
            self.run_dir,
            self.exit_file,
            watch_file=self.dist.is_rank_zero,
            end_process=self.end_process,
        )
        self.hold(self._preemption.close)
        return self._preemption

    def hold(self, release: Callable[[], Any]) -> None:
        """Call `release` when the session is closed, before what is held already is released."""
        self._stack.callback(release)

    def close(self) -> None:
        """Release everything; later calls do nothing."""
        self._stack.close()
