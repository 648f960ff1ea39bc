"""What the tests plant in a rank before it runs: a sample that spoils its step, a rank that sleeps, a disk that is slow."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import Any

import torch


def plant(what: dict[str, Any], rank: int) -> None:
    """Plant everything that `what` names in this rank."""
    for name, value in what.items():
        PLANTS[name](value, rank)


def _spoil(sample_id: str, change: Any) -> None:
    from onellm_dist.data.reader import Reader

    read = Reader._read

    def spoilt(self: Reader, ref: Any, name: str) -> Any:
        sample = read(self, ref, name)
        return change(sample) if name.split("@", maxsplit=1)[0] == sample_id else sample

    Reader._read = spoilt  # type: ignore[method-assign]


def _deadly(sample_id: str, rank: int) -> None:
    """Decoding a sample kills the process that does it (as running out of memory, or a crash in C, would)."""
    _spoil(sample_id, lambda sample: os.kill(os.getpid(), signal.SIGKILL))


def _nan(sample_id: str, rank: int) -> None:
    """The media of a sample decode to NaN."""
    _spoil(
        sample_id,
        lambda sample: replace(
            sample, values={k: torch.full_like(v, torch.nan) for k, v in sample.values.items()}
        ),
    )


def _leap(sample_id: str, rank: int) -> None:
    """The cross-entropy of a sample's tokens comes out 50 higher."""

    def leaping(loss: Any, nll: Any, own: Any) -> Any:
        return loss + 50 * own.sum(), nll + 50 * own

    _bend(sample_id, leaping)


def _steep(sample_id: str, rank: int) -> None:
    """The gradient of a sample's micro-batch comes out 10,000 times as long; the losses are what they were."""

    def steep(loss: Any, nll: Any, own: Any) -> Any:
        return loss + 1e4 * (loss - loss.detach()), nll

    _bend(sample_id, steep)


def _bend(sample_id: str, change: Any) -> None:
    """What either engine's forward gives for a pack with the sample goes through `change(loss, nll, own)`; own: [N], 1 at its tokens."""
    from onellm_dist.train.engine.deepspeed.engine import DeepSpeedEngine
    from onellm_dist.train.engine.fsdp.engine import FsdpEngine

    def bent(forward: Any) -> Any:
        def bending(self: Any, batch: Any, *, last: bool) -> Any:
            loss, nll, index = forward(self, batch, last=last)
            for place, name in enumerate(batch.sample_ids):
                if (
                    name.split("@", maxsplit=1)[0] == sample_id
                    and place not in batch.skipped_samples
                ):
                    loss, nll = change(loss, nll, (index == place).float())
            return loss, nll, index

        return bending

    for engine in (DeepSpeedEngine, FsdpEngine):
        engine.forward = bent(engine.forward)  # type: ignore[method-assign]


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

    DeepSpeedEngine.forward = sleepy  # type: ignore[method-assign]


def _slow_writes(seconds: float, rank: int) -> None:
    """Every file of a checkpoint takes so long at least."""
    from onellm_dist.train.checkpoint import writer as checkpoint_writer

    write = checkpoint_writer.write_tensors

    def slow(*arguments: Any) -> Any:
        time.sleep(seconds / 2)
        written = write(*arguments)
        time.sleep(seconds / 2)
        return written

    checkpoint_writer.write_tensors = slow


PLANTS = {
    "deadly": _deadly,
    "nan": _nan,
    "leap": _leap,
    "steep": _steep,
    "sleep": _sleep,
    "slow_writes": _slow_writes,
}
