"""Devices with little memory: a callback that raises torch's error, and constants of processors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from onellm_dist import Callback
from onellm_dist.common.resources import name_processors
from onellm_dist.planner.calibrate import format_kind
from onellm_dist.planner.hardware import GpuKind, get_gpu_kind


class SmallMemory(Callback):
    """The encoder has no room for a micro-batch beyond a number of tokens.

    SMALL_MEMORY is `TOKENS RANKS STEP`: the number, ranks with commas between them, and the first
    step in which memory is short.
    """

    def on_fit_start(self) -> None:
        tokens, ranks, step = os.environ["SMALL_MEMORY"].split()
        if str(self.trainer.dist.rank) not in ranks.split(","):
            return
        block: Any = self.trainer.model.encoder.blocks[-1].mlp
        forward = block.forward

        def run(x: torch.Tensor) -> Any:
            if len(x) > int(tokens) and self.trainer.state.step >= int(step):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return forward(x)

        block.forward = run


def write_constants(cache: Path, *, memory_gb: float = 500.0, **more: object) -> GpuKind:
    """Constants of this machine's processors in a user's cache, such as a calibration writes.

    Args:
        cache: the cache.
        memory_gb: of the machine.
        more: other constants.
    """
    kind = get_gpu_kind("h100").model_copy(
        update={
            "kind": "cpu",
            "aliases": (),
            "device_names": (name_processors(),),
            "memory_gb": memory_gb,
            "context_gb": 0.05,
            "shared": True,
            "board_watts": 200.0,
            "power_source": "a test",
            "measured": ("matmul_share",),
            **more,
        }
    )
    folder = cache / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.yaml").write_text(format_kind(kind, name_processors()))
    return kind
