"""Callbacks for runs under torchrun: a node that is lost at a step, a run that waits for one."""

from __future__ import annotations

import os
import signal
import time

from onellm_dist.train.callbacks.base import Callback

STEP_VARIABLE = "LOSE_NODE_AT"
"""Environment variable of the node that is lost: the step."""
AWAITED_AT = 3


class LostNode(Callback):
    """Kills the agent above this rank, and the rank."""

    def on_step_start(self, step: int) -> None:
        if os.environ.get(STEP_VARIABLE) == str(step):
            for pid in (os.getppid(), os.getpid()):
                os.kill(pid, signal.SIGKILL)


class AwaitNode(Callback):
    """A run of one rank waits at a step until it is asked to stop: a node has joined."""

    def on_step_start(self, step: int) -> None:
        deadline = time.monotonic() + 120
        alone = self.trainer.dist.world_size == 1
        while alone and step == AWAITED_AT and not self.trainer.preemption.is_requested():
            assert time.monotonic() < deadline, "no node has joined"
            time.sleep(0.05)
