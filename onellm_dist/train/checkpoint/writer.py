"""Checkpoints written in the background: a copy in host memory at the end of a step, a thread a rank that writes it while training goes on.
Where training waits for it, there is no copy.

No collective is called from a thread. Each rank writes its file and, when that is whole, a small JSON beside it; rank 0's thread waits for
all of these, writes the manifest and renames the folder. So a checkpoint is finished also where training has failed meanwhile. What a
rank could not write, the ranks tell each other at the next step boundary, and raise together.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import sync
from onellm_dist.common.run_files import CHECKPOINT_MANIFEST
from onellm_dist.config.schema import CheckpointSection
from onellm_dist.train.checkpoint.files import AbandonedError, write_tensors
from onellm_dist.train.checkpoint.folder import (
    VERSION,
    checkpoint_name,
    prune,
    put_in_place,
)
from onellm_dist.train.checkpoint.staging_buffer import HostCopy, live_state
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine, LocalRange

POLL_S = 0.02
LINGER_S = 10.0
"""Seconds that a start which failed gives a checkpoint in flight."""

Commit = Callable[["Writing", int], None]
"""Called by rank 0's thread when a checkpoint is whole, with its bytes."""


class Writing:
    """One checkpoint on its way to the disk, as one rank sees it.

    Args:
        about: rank 0: what the manifest adds, asked for in the thread.
        on_commit: rank 0: called when the checkpoint has its name.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, torch.Tensor],
        ranges: Sequence[LocalRange],
        dist: Distributed,
        about: Callable[[], dict[str, Any]],
        on_commit: Commit | None = None,
    ) -> None:
        self.folder, self.partial = folder, partial_of(folder)
        self.copied_at = time.perf_counter()
        self.error: str | None = None
        self.abandon = threading.Event()
        self._tensors, self._dist, self._about, self._on_commit = tensors, dist, about, on_commit
        self._ranges = [(r.name, list(r.shape), r.start, r.length) for r in ranges]
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    @property
    def failed(self) -> bool:
        """This rank could not do its part."""
        return self.error is not None

    def _run(self) -> None:
        try:
            self._write_own()
            if self._dist.is_rank_zero:
                self._commit()
        except AbandonedError:
            pass
        except Exception as error:  # whatever it is, the main threads must hear of it
            self.error = f"rank {self._dist.rank}: {error}"

    def _write_own(self) -> None:
        name = f"rank-{self._dist.rank:05d}.safetensors"
        written = write_tensors(self.partial / name, self._tensors, self.abandon)
        part = {
            "file": name,
            "size": written.size,
            "sha256": written.sha256,
            "ranges": self._ranges,
        }
        aside = self.partial / f".{name}.json"
        aside.write_text(json.dumps(part), encoding="utf-8")
        aside.rename(_part_file(self.partial, self._dist.rank))

    def _commit(self) -> None:
        about = self._about()
        parts = [self._wait_for(rank) for rank in range(self._dist.world_size)]
        parameters: dict[str, Any] = {}
        for part in parts:
            for name, shape, start, length in part["ranges"]:
                parameters.setdefault(name, {"shape": shape, "pieces": []})["pieces"].append(
                    [start, length, part["file"]]
                )
        manifest = {
            "version": VERSION,
            **about,
            "written": time.time(),
            "world": self._dist.world_size,
            "files": {p["file"]: p["size"] for p in parts},
            "sha256": {p["file"]: p["sha256"] for p in parts},
            "parameters": parameters,
        }
        path = self.partial / CHECKPOINT_MANIFEST
        path.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync(path)
        for rank in range(self._dist.world_size):
            _part_file(self.partial, rank).unlink()
        sync(self.partial)
        put_in_place(self.partial, self.folder)
        if self._on_commit is not None:
            self._on_commit(self, sum(p["size"] for p in parts))

    def _wait_for(self, rank: int) -> dict[str, Any]:
        path = _part_file(self.partial, rank)
        while not path.exists():
            if self.abandon.wait(POLL_S):
                raise AbandonedError
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found


def begin(
    folder: Path,
    copy: HostCopy | None,
    engine: Engine,
    dist: Distributed,
    about: dict[str, Any],
    more: Callable[[], dict[str, Any]],
    on_commit: Commit | None = None,
) -> Writing:
    """Start to write the state. Called by all ranks together.

    Args:
        copy: where the state is copied to first, so that the engine may step as soon as this returns; None: not before `settle`.
        about: goes into the manifest as it is; the same on every rank.
        more: rank 0's thread asks it for what else goes in.

    Raises:
        OneLLMError: rank 0 could not make the folder.
    """
    problem = None
    if dist.is_rank_zero:
        try:
            shutil.rmtree(partial_of(folder), ignore_errors=True)
            partial_of(folder).mkdir(parents=True)
        except OSError as error:
            problem = f"rank 0: {error}"
    problem = dist.broadcast(problem)
    if problem is not None:
        raise not_written(folder, problem)
    ranges = engine.ranges()
    fixed = {
        **about,
        "optimizer": engine.optimizer.describe(),
        "optimizer_steps": engine.optimizer_steps,
    }
    tensors = (
        live_state(ranges, engine.state_keys)
        if copy is None
        else copy.take(ranges, engine.state_keys)
    )
    return Writing(folder, tensors, ranges, dist, lambda: {**fixed, **more()}, on_commit)


def settle(writing: Writing, dist: Distributed) -> None:
    """Wait until a checkpoint has its name. Called by all ranks together.

    Raises:
        OneLLMError: some rank could not write; nothing is left of it, and every rank raises.
    """
    if not dist.is_rank_zero:
        writing.thread.join()
    failures = [
        failure for failure in dist.gather(None if dist.is_rank_zero else writing.error) if failure
    ]
    if dist.is_rank_zero:
        if failures:
            writing.abandon.set()
        writing.thread.join()
        failures += [writing.error] if writing.error else []
    failures = dist.broadcast(failures)
    if failures:
        if dist.is_rank_zero:
            shutil.rmtree(writing.partial, ignore_errors=True)
        raise not_written(writing.folder, failures[0])


def save_state(folder: Path, engine: Engine, dist: Distributed, about: dict[str, Any]) -> None:
    """Write the trainable state of every rank to `folder` and wait for it. Called by all ranks.

    Args:
        about: goes into the manifest as it is (`step`, the seed, ...); the same on every rank.

    Raises:
        OneLLMError: a rank could not write (a full disk); nothing is left of it, and every rank raises.
    """
    settle(begin(folder, None, engine, dist, about, dict), dist)


class Checkpoints:
    """The checkpoints of a run: when they are due, at most one in flight, how many stay. Every method but `failed` is called by all ranks.

    Args:
        about: step -> what the manifest says beside the state; the same on every rank.
        source: says where the frozen weights came from; rank 0's thread asks once.
        tell: rank 0: an event with its fields.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        dist: Distributed,
        config: CheckpointSection,
        about: Callable[[int], dict[str, Any]],
        source: Callable[[], dict[str, Any]],
        tell: Callable[..., None],
    ) -> None:
        self._folder, self._engine, self._dist, self._config = folder, engine, dist, config
        self._about, self._source, self._tell = about, source, tell
        self._copy = HostCopy()
        self._writing: Writing | None = None
        self._frozen: dict[str, Any] | None = None
        self._saved_at = time.monotonic()
        self.stall_seconds = 0.0
        """What the newest save cost the training: waiting for the one before it, and the copy."""

    @property
    def failed(self) -> bool:
        """This rank could not write the checkpoint in flight; the ranks tell each other once a step."""
        return self._writing is not None and self._writing.failed

    @property
    def overdue(self) -> bool:
        """`checkpoint.every_minutes` have gone by here; rank 0's clock decides."""
        minutes = self._config.every_minutes
        return (
            self._dist.is_rank_zero
            and minutes is not None
            and time.monotonic() - self._saved_at >= 60 * minutes
        )

    def save(self, step: int, *, wait: bool = False) -> None:
        """Begin to write the checkpoint after `step` steps.

        Args:
            wait: until it is whole (a preemption, the end of the run, `checkpoint.asynchronous: false`).

        Raises:
            OneLLMError: this one or the one before it could not be written.
        """
        started = time.perf_counter()
        wait = wait or not self._config.asynchronous
        self.settle()
        self._saved_at = time.monotonic()
        folder = self._folder / checkpoint_name(step)

        def committed(writing: Writing, size: int) -> None:
            prune(
                self._folder,
                self._config.keep,
                self._config.keep_every,
                self._config.keep_every_hours,
            )
            seconds = time.perf_counter() - started
            stall = seconds if wait else writing.copied_at - started
            self._tell(
                "checkpoint",
                step=step,
                folder=folder.name,
                seconds=round(seconds, 3),
                stall_seconds=round(stall, 4),
                bytes=size,
            )

        copy = None if wait else self._copy
        self._writing = begin(
            folder, copy, self._engine, self._dist, self._about(step), self._more, committed
        )
        if wait:
            self.settle()
        self.stall_seconds = time.perf_counter() - started

    def settle(self) -> None:
        """Wait for the checkpoint in flight, if there is one.

        Raises:
            OneLLMError: it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            settle(writing, self._dist)

    def linger(self, seconds: float = LINGER_S) -> None:
        """This rank fails: give its part of a checkpoint in flight the time to get whole. Not collective."""
        if self._writing is not None:
            self._writing.thread.join(seconds)

    def _more(self) -> dict[str, Any]:
        if self._frozen is None:
            self._frozen = self._source()
        return {"frozen": self._frozen}


def partial_of(folder: Path) -> Path:
    """Where a checkpoint is written until it is whole."""
    return folder.with_name(f".{folder.name}.partial")


def not_written(folder: Path, problem: str) -> OneLLMError:
    """What every rank raises when one could not write."""
    return OneLLMError(
        f"checkpoint {folder} was not written: {problem}",
        "the newest whole checkpoint is the one before it.",
        "make room or mend the file system, and start again.",
    )


def _part_file(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.json"
