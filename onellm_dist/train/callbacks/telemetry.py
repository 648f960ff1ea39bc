"""What is read of a step beside its loss: at the log interval alone where reading waits for the device or for other ranks."""

from __future__ import annotations

import resource
from dataclasses import dataclass

import torch

from onellm_dist.config.schema import RunConfig
from onellm_dist.train.callbacks.experts import RouterWatch, Starvation
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.records.metrics import Events, Readings


@dataclass
class Telemetry:
    """Called by all ranks together."""

    config: RunConfig
    dist: Distributed
    events: Events
    router: RouterWatch
    stalled: float = 0.0
    """Seconds that training stood still for checkpoints since the last step was reported; whoever writes them adds to it."""

    def __post_init__(self) -> None:
        self._starvation = Starvation(
            self.config.track.underused_expert_share, self.config.track.underused_expert_steps
        )

    def read(self, step: int) -> Readings:
        """What goes into the line of a step."""
        stalled, self.stalled = self.stalled, 0.0
        if (step + 1) % self.config.train.log_every and step + 1 != self.config.train.steps:
            return Readings(checkpoint_stall_seconds=stalled)
        load = self.router.read()
        for expert in self._starvation.update(step, load) if load else ():
            self._warn(step, expert, load)
        peak = max(self.dist.gather(peak_memory(self.dist.device)))
        return Readings(load or None, peak, stalled)

    def _warn(self, step: int, expert: int, load: dict[str, list[float]]) -> None:
        track = self.config.track
        shares = {name: round(shares[expert], 4) for name, shares in load.items()}
        told = ", ".join(f"{name} {share:.4f}" for name, share in shares.items())
        self.events.write(
            "expert_starves",
            step=step,
            expert=expert,
            load=shares,
            say=f"WARNING: expert {expert} starves: for {track.underused_expert_steps} steps no modality gave it {track.underused_expert_share:g} ({told})",
        )


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process has held: of tensors on a GPU, of resident memory on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
