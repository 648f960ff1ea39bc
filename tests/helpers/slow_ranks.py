"""Callbacks that slow a rank down: its forward, or its loader."""

from __future__ import annotations

import time
from typing import Any

from onellm_dist import Callback

SECONDS = 0.4
"""Far above what the rest of a step takes, and what it varies by on a busy machine."""


class SlowForward(Callback):
    """The encoder of rank 1 sleeps."""

    def on_fit_start(self) -> None:
        if self.trainer.dist.rank == 1:
            block: Any = self.trainer.model.encoder.blocks[0].mlp
            forward = block.forward

            def sleep(*args: Any) -> Any:
                time.sleep(SECONDS / 2)  # it runs twice: for pictures, and for other modalities
                return forward(*args)

            block.forward = sleep


class SlowLoader(Callback):
    """The loader of rank 0 sleeps."""

    def on_fit_start(self) -> None:
        if self.trainer.dist.rank == 0:
            stream: Any = self.trainer._micro_batches
            read = stream.next

            def sleep(planned: Any) -> Any:
                time.sleep(SECONDS)
                return read(planned)

            stream.next = sleep
