"""Telemetry: peak memory of the ranks, and the time that training waited for checkpoints."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import Any

import torch

from onellm_dist.train.callbacks.base import Callback


class Telemetry(Callback):
    """Records `peak_memory_bytes` at the log interval and `checkpoint_stall_seconds` at every step.

    Args:
        device: this rank's device.
        log_every: steps between two readings of the memory.
        steps: optimizer steps of the whole run; the last one is read too.
    """

    def __init__(self, device: torch.device, *, log_every: int, steps: int) -> None:
        self._device = device
        self._log_every = log_every
        self._steps = steps
        self._stall_seconds = 0.0

    def metrics_to_reduce(self, step: int) -> Mapping[str, float]:
        if (step + 1) % self._log_every and step + 1 != self._steps:
            return {}
        return {"peak_memory_bytes": peak_memory(self._device)}

    def metrics_to_record(self, step: int) -> Mapping[str, Any]:
        stalled = self._stall_seconds
        self._stall_seconds = 0.0
        return {"checkpoint_stall_seconds": stalled}

    def on_checkpoint(self, steps_done: int, stall_seconds: float) -> None:
        self._stall_seconds += stall_seconds


def peak_memory(device: torch.device) -> int:
    """Largest number of bytes that this process has held.

    Tensors on a GPU count there; on a CPU, resident memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
