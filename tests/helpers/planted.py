"""Faults that tests plant in a rank: samples that break a step, a sleeping rank, a slow disk."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch


def plant(what: dict[str, Any], rank: int) -> None:
    """Plant everything that `what` names in this rank."""
    for name, value in what.items():
        PLANTS[name](value, rank)


def _environment(variables: dict[str, str], rank: int) -> None:
    """Environment variables."""
    os.environ.update(variables)


def _change_sample(sample_id: str, change: Any, method: str = "_decode") -> None:
    """Pass what a method of Reader gives for a sample (`_decode`: its values) through `change`."""
    from onellm_dist.data.reader import Reader

    original = getattr(Reader, method)

    def changed(self: Reader, *arguments: Any) -> Any:
        found = original(self, *arguments)
        name = next(argument for argument in arguments if isinstance(argument, str))
        return change(found) if name.split("@", maxsplit=1)[0] == sample_id else found

    setattr(Reader, method, changed)


def _poison(samples: dict[str, str], rank: int) -> None:
    """Encoding a sample's text crashes its process; its media make it hang or use up memory."""
    faults = {"crash": (_crash, "_prepare"), "hang": (_hang, "_decode"), "eat": (_eat, "_decode")}
    for sample_id, what in samples.items():
        _change_sample(sample_id, *faults[what])


def _crash(found: Any) -> None:
    ctypes.string_at(0)


def _hang(found: Any) -> None:
    ctypes.CDLL(None).pause()  # in C code, which no exception of Python ends


def _eat(found: Any) -> None:
    kept = []
    while True:
        kept.append(bytearray(1 << 24))


def _no_handover(step: int, rank: int) -> None:
    """From a step on, a loader worker has no memory for its batch."""
    from onellm_dist.common.workers import handover
    from onellm_dist.data.worker import BatchReader

    create, read, failing = handover.create_memory, BatchReader.read, [False]

    def read_and_note(reader: Any, task: Any) -> Any:
        failing[0] = failing[0] or task.micro.step == step
        return read(reader, task)

    def fail() -> int:
        if failing[0]:
            failing[0] = False
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return create()

    BatchReader.read = read_and_note  # type: ignore[assignment,method-assign]
    handover.create_memory = fail


def _nan(sample_id: str, rank: int) -> None:
    """The media of a sample decode to NaN."""
    _change_sample(
        sample_id,
        lambda values: {
            name: [torch.full_like(span, torch.nan) for span in spans]
            for name, spans in values.items()
        },
    )


def _spike(sample_id: str, rank: int) -> None:
    """The cross-entropy of a sample's tokens comes out 50 higher."""

    def raise_loss(loss: Any, nll: Any, own: Any) -> Any:
        return loss + 50 * own.sum(), nll + 50 * own

    _change_forward(sample_id, raise_loss)


def _steep(sample_id: str, rank: int) -> None:
    """The gradient of a sample's micro-batch is 10,000 times as long; the losses are as before."""

    def raise_gradient(loss: Any, nll: Any, own: Any) -> Any:
        return loss + 1e4 * (loss - loss.detach()), nll

    _change_forward(sample_id, raise_gradient)


def _change_forward(sample_id: str, change: Any) -> None:
    """Pass what either engine's forward gives for a pack with the sample through `change`.

    Its arguments are loss [], nll [N] and own [N], which is 1 at the sample's tokens.
    """
    from onellm_dist.train.engine.deepspeed.engine import DeepSpeedEngine
    from onellm_dist.train.engine.fsdp.engine import FsdpEngine

    def wrap(forward: Any) -> Any:
        def changed(self: Any, batch: Any, *, last: bool) -> Any:
            loss, nll, index = forward(self, batch, last=last)
            for place, name in enumerate(batch.sample_ids):
                if (
                    name.split("@", maxsplit=1)[0] == sample_id
                    and place not in batch.skipped_samples
                ):
                    loss, nll = change(loss, nll, (index == place).float())
            return loss, nll, index

        return changed

    for engine in (DeepSpeedEngine, FsdpEngine):
        engine.forward = wrap(engine.forward)  # type: ignore[method-assign]  # the fault


def _sleep(where: dict[str, int], rank: int) -> None:
    """One rank falls asleep in the forward of a step."""
    if rank != where["rank"]:
        return
    from onellm_dist.train.engine.deepspeed.engine import DeepSpeedEngine

    forward = DeepSpeedEngine.forward
    steps = [0]

    def sleepy(self: DeepSpeedEngine, batch: Any, *, last: bool) -> Any:
        if steps[0] == where["step"]:
            time.sleep(3600)
        steps[0] += last
        return forward(self, batch, last=last)

    DeepSpeedEngine.forward = sleepy  # type: ignore[method-assign]  # the fault


def _slow_writes(seconds: float, rank: int) -> None:
    """Every file of a checkpoint takes at least this long."""
    from onellm_dist.train.checkpoint import writer

    module: Any = writer
    write = module.write_tensors

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds / 2)
        written = write(*arguments)
        time.sleep(seconds / 2)
        return written

    module.write_tensors = slow


def _slow_steps(seconds: float, rank: int) -> None:
    """Every forward takes this much longer."""
    from onellm_dist.train.engine.deepspeed.engine import DeepSpeedEngine

    forward = DeepSpeedEngine.forward

    def slow(self: DeepSpeedEngine, batch: Any, *, last: bool) -> Any:
        time.sleep(seconds)
        return forward(self, batch, last=last)

    DeepSpeedEngine.forward = slow  # type: ignore[method-assign]  # the fault


def _impatient(seconds: float, rank: int) -> None:
    """A start waits this long for the ranks of an earlier one."""
    from onellm_dist.train.records import run_directory

    run_directory.LOCK_PATIENCE_S = seconds


def _no_inductor(_: bool, rank: int) -> None:
    """What is compiled is traced as for inductor, but run by torch: inductor would take minutes."""
    torch.compile = partial(torch.compile, backend="eager")


def _stop(step: int, rank: int) -> None:
    """The run is asked to stop in this step of the start (the first is 0)."""
    from onellm_dist.train.callbacks.preemption import Preemption

    ask, asked = Preemption.is_requested, [0]

    def ask_once(self: Preemption) -> bool:
        if asked[0] == step:
            self.reason = "planted"
        asked[0] += 1
        return ask(self)

    Preemption.is_requested = ask_once  # type: ignore[method-assign]


def _kill(step: int, rank: int) -> None:
    """Every rank gets SIGKILL in this step of the start (the first is 0)."""
    from onellm_dist.train.callbacks.preemption import Preemption

    ask, asked = Preemption.is_requested, [0]

    def ask_or_die(self: Preemption) -> bool:
        if asked[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        asked[0] += 1
        return ask(self)

    Preemption.is_requested = ask_or_die  # type: ignore[method-assign]  # the fault


def _unreadable(modality: str, rank: int) -> None:
    """No sample of a modality can be decoded, as where a library is missing."""
    from onellm_dist.modalities import get_modality

    def fail(*_: Any) -> Any:
        raise RuntimeError("planted")

    type(get_modality(modality)).decode = fail  # type: ignore[method-assign, assignment]  # the fault


def _blocked_outputs(_: bool, rank: int) -> None:
    """A tracker does not answer, and the disk is full for the first lines of metrics."""
    from onellm_dist.train.callbacks import trackers

    trackers.PATIENCE_S = 1.0
    trackers.tracker_class = lambda name: BlockedTracker
    open_path, left = Path.open, [2]

    def fail_first(self: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if self.name == "metrics.jsonl" and mode == "ab" and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return open_path(self, mode, *arguments, **options)

    Path.open = fail_first  # type: ignore[method-assign]  # the fault


class BlockedTracker:
    """A tracker whose service never answers."""

    requires_logging_directory = False

    def __init__(self, project: str) -> None:
        self.project = project

    def start(self) -> None:
        time.sleep(3600)


PLANTS: dict[str, Callable[[Any, int], None]] = {
    "environment": _environment,
    "poison": _poison,
    "no_handover": _no_handover,
    "nan": _nan,
    "spike": _spike,
    "steep": _steep,
    "sleep": _sleep,
    "slow_writes": _slow_writes,
    "slow_steps": _slow_steps,
    "impatient": _impatient,
    "no_inductor": _no_inductor,
    "stop": _stop,
    "kill": _kill,
    "unreadable": _unreadable,
    "blocked_outputs": _blocked_outputs,
}
