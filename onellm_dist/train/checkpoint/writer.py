"""Checkpoints written in the background: a thread of each rank writes a copy of its state.

Where training waits for a checkpoint, there is no copy.

No collective is called from a thread. Each rank writes its file and, when that is complete, a small
JSON beside it; rank 0's thread waits for all of these, writes the manifest and renames the folder.
So a checkpoint is finished even if training has failed meanwhile. If a rank could not write, the
ranks learn it at the next step boundary and raise together.
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

from onellm_dist.common.checksums import seal
from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import replace_folder, sync, write_atomic
from onellm_dist.common.run_files import CHECKPOINT_MANIFEST
from onellm_dist.config.schema import CheckpointSection
from onellm_dist.train.checkpoint.files import AbandonedError, write_tensors
from onellm_dist.train.checkpoint.folder import VERSION, make_checkpoint_name, prune
from onellm_dist.train.checkpoint.staging_buffer import StagingBuffer, read_live_state
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine, LocalRange

POLL_S = 0.02
DRAIN_S = 10.0
"""Seconds that a start which failed gives a pending save."""

OnCommit = Callable[["SaveHandle", int], None]
"""Called by rank 0's thread when a checkpoint is complete, with its size in bytes."""


class SaveHandle:
    """A pending save, as one rank sees it: a thread that writes this rank's part of a checkpoint.

    Args:
        folder: the checkpoint's final path.
        tensors: what this rank writes, by name.
        ranges: the ranges that these tensors are of.
        dist: the ranks.
        describe: on rank 0: what the manifest adds; the thread asks for it.
        on_commit: on rank 0: called when the checkpoint has its name.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, torch.Tensor],
        ranges: Sequence[LocalRange],
        dist: Distributed,
        describe: Callable[[], dict[str, Any]],
        on_commit: OnCommit | None = None,
    ) -> None:
        self.folder = folder
        self.partial = get_partial_path(folder)
        self.copied_at = time.perf_counter()
        self.error: str | None = None
        self.abandon = threading.Event()
        self._tensors = tensors
        self._dist = dist
        self._describe = describe
        self._on_commit = on_commit
        self._ranges = [(r.name, list(r.shape), r.start, r.length) for r in ranges]
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    @property
    def failed(self) -> bool:
        """Whether this rank could not do its part."""
        return self.error is not None

    def _run(self) -> None:
        try:
            self._write_part()
            if self._dist.is_rank_zero:
                self._commit()
        except AbandonedError:
            pass
        except Exception as error:  # whatever it is, the main threads must learn of it
            self.error = f"rank {self._dist.rank}: {error}"

    def _write_part(self) -> None:
        name = f"rank-{self._dist.rank:05d}.safetensors"
        record = write_tensors(self.partial / name, self._tensors, self.abandon)
        part = {
            "file": name,
            "size": record.size,
            "sha256": record.sha256,
            "ranges": self._ranges,
        }
        write_atomic(_get_part_path(self.partial, self._dist.rank), json.dumps(part))

    def _commit(self) -> None:
        more = self._describe()
        parts = [self._wait_for_part(rank) for rank in range(self._dist.world_size)]
        parameters: dict[str, Any] = {}
        for part in parts:
            for name, shape, start, length in part["ranges"]:
                entry = parameters.setdefault(name, {"shape": shape, "pieces": []})
                entry["pieces"].append([start, length, part["file"]])
        manifest = {
            "version": VERSION,
            **more,
            "written": time.time(),
            "world_size": self._dist.world_size,
            "files": {p["file"]: p["size"] for p in parts},
            "sha256": {p["file"]: p["sha256"] for p in parts},
            "parameters": parameters,
        }
        write_atomic(self.partial / CHECKPOINT_MANIFEST, json.dumps(seal(manifest), indent=1))
        for rank in range(self._dist.world_size):
            _get_part_path(self.partial, rank).unlink()
        sync(self.partial)
        replace_folder(self.partial, self.folder)
        if self._on_commit is not None:
            self._on_commit(self, sum(p["size"] for p in parts))

    def _wait_for_part(self, rank: int) -> dict[str, Any]:
        path = _get_part_path(self.partial, rank)
        while not path.exists():
            if self.abandon.wait(POLL_S):
                raise AbandonedError
        part: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return part


def start_save(
    folder: Path,
    buffer: StagingBuffer | None,
    engine: Engine,
    dist: Distributed,
    manifest: dict[str, Any],
    describe: Callable[[], dict[str, Any]],
    on_commit: OnCommit | None = None,
) -> SaveHandle:
    """Start to write the state. All ranks call it together.

    Args:
        folder: the checkpoint's final path.
        buffer: the state is copied to it first, so that the engine may step as soon as this
            returns. None: the engine may not step before `wait_for_save`.
        engine: holds the state.
        dist: the ranks.
        manifest: goes into the manifest as it is; the same on every rank.
        describe: rank 0's thread asks it for what else goes into the manifest.
        on_commit: on rank 0: called when the checkpoint has its name.

    Raises:
        OneLLMError: rank 0 could not create the folder.
    """
    problem = None
    if dist.is_rank_zero:
        try:
            shutil.rmtree(get_partial_path(folder), ignore_errors=True)
            get_partial_path(folder).mkdir(parents=True)
        except OSError as error:
            problem = f"rank 0: {error}"
    problem = dist.broadcast(problem)
    if problem is not None:
        raise _make_error(folder, problem)
    ranges = engine.ranges()
    fixed = {
        **manifest,
        "optimizer": engine.optimizer.describe(),
        "optimizer_steps": engine.optimizer_steps,
    }
    tensors = (
        read_live_state(ranges, engine.state_keys)
        if buffer is None
        else buffer.load(ranges, engine.state_keys)
    )
    return SaveHandle(folder, tensors, ranges, dist, lambda: {**fixed, **describe()}, on_commit)


def wait_for_save(handle: SaveHandle, dist: Distributed) -> None:
    """Wait until a checkpoint has its name. All ranks call it together.

    Raises:
        OneLLMError: some rank could not write; nothing is left of it, and every rank raises.
    """
    if not dist.is_rank_zero:
        handle.thread.join()
    failures = [
        failure for failure in dist.gather(None if dist.is_rank_zero else handle.error) if failure
    ]
    if dist.is_rank_zero:
        if failures:
            handle.abandon.set()
        handle.thread.join()
        failures += [handle.error] if handle.error else []
    failures = dist.broadcast(failures)
    if failures:
        if dist.is_rank_zero:
            shutil.rmtree(handle.partial, ignore_errors=True)
        raise _make_error(handle.folder, failures[0])


def save_state(folder: Path, engine: Engine, dist: Distributed, manifest: dict[str, Any]) -> None:
    """Write the trainable state of every rank to `folder` and wait for it. All ranks call it.

    Args:
        folder: the checkpoint's path.
        engine: holds the state.
        dist: the ranks.
        manifest: goes into the manifest as it is (`steps_done`, the seed, ...); the same on every
            rank.

    Raises:
        OneLLMError: a rank could not write (a full disk); nothing is left, and every rank raises.
    """
    wait_for_save(start_save(folder, None, engine, dist, manifest, dict), dist)


class Checkpoints:
    """The checkpoints of a run: when they are due, at most one pending, how many stay.

    All ranks call every method but `failed` and `drain` together.

    Args:
        folder: the folder of all checkpoints.
        engine: holds the state.
        dist: the ranks.
        config: the recipe's `checkpoint` section.
        make_manifest: steps done to what the manifest says beside the state; the same on every
            rank.
        describe_frozen: says where the frozen weights came from; rank 0's thread asks once.
        write_event: on rank 0: writes an event with its fields.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        dist: Distributed,
        config: CheckpointSection,
        make_manifest: Callable[[int], dict[str, Any]],
        describe_frozen: Callable[[], dict[str, Any]],
        write_event: Callable[..., None],
    ) -> None:
        self._folder = folder
        self._engine = engine
        self._dist = dist
        self._config = config
        self._make_manifest = make_manifest
        self._describe_frozen = describe_frozen
        self._write_event = write_event
        self._buffer = StagingBuffer()
        self._pending: SaveHandle | None = None
        self._frozen: dict[str, Any] | None = None
        self._saved_at = time.monotonic()
        self.stall_seconds = 0.0
        """What the newest save cost training: waiting for the one before it, and the copy."""

    @property
    def failed(self) -> bool:
        """Whether this rank could not write the pending save; the ranks share this once a step."""
        return self._pending is not None and self._pending.failed

    @property
    def is_overdue(self) -> bool:
        """Whether `checkpoint.every_minutes` have passed; rank 0's clock decides."""
        minutes = self._config.every_minutes
        return (
            self._dist.is_rank_zero
            and minutes is not None
            and time.monotonic() - self._saved_at >= 60 * minutes
        )

    def save(self, steps_done: int, *, wait: bool = False) -> None:
        """Start to write the checkpoint after this number of steps.

        Args:
            steps_done: number of optimizer steps done.
            wait: until it is complete (a preemption, the end of the run); always with
                `checkpoint.asynchronous: false`.

        Raises:
            OneLLMError: this save or the one before it could not be written.
        """
        started = time.perf_counter()
        wait = wait or not self._config.asynchronous
        self.wait()
        self._saved_at = time.monotonic()

        def finish(handle: SaveHandle, size: int) -> None:
            self._prune()
            seconds = time.perf_counter() - started
            stall = seconds if wait else handle.copied_at - started
            self._write_event(
                "checkpoint",
                steps_done=steps_done,
                folder=handle.folder.name,
                seconds=round(seconds, 3),
                stall_seconds=round(stall, 4),
                bytes=size,
            )

        self._pending = start_save(
            self._folder / make_checkpoint_name(steps_done),
            None if wait else self._buffer,
            self._engine,
            self._dist,
            {"steps_done": steps_done, **self._make_manifest(steps_done)},
            self._describe,
            finish,
        )
        if wait:
            self.wait()
        self.stall_seconds = time.perf_counter() - started

    def wait(self) -> None:
        """Wait for the pending save, if there is one.

        Raises:
            OneLLMError: it could not be written.
        """
        handle = self._pending
        self._pending = None
        if handle is not None:
            wait_for_save(handle, self._dist)

    def drain(self, seconds: float = DRAIN_S) -> None:
        """Give this rank's part of a pending save time to finish, when this rank fails."""
        if self._pending is not None:
            self._pending.thread.join(seconds)

    def _prune(self) -> None:
        config = self._config
        prune(self._folder, config.keep, config.keep_every, config.keep_every_hours)

    def _describe(self) -> dict[str, Any]:
        if self._frozen is None:
            self._frozen = self._describe_frozen()
        return {"frozen": self._frozen}


def get_partial_path(folder: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return folder.with_name(f".{folder.name}.partial")


def _make_error(folder: Path, problem: str) -> OneLLMError:
    """What every rank raises when one could not write."""
    return OneLLMError(
        f"checkpoint {folder} was not written: {problem}",
        "the latest complete checkpoint is the one before it.",
        "free disk space or repair the file system, and start again.",
    )


def _get_part_path(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.json"
