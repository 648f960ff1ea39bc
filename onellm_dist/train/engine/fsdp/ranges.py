"""What a rank holds under FSDP2: a shard of each parameter along its first dimension, hence a contiguous range of it.

With hybrid sharding several ranks hold the same shard; each speaks for an equal part of it, so that every element is held exactly once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from onellm_dist.train.engine.base import MASTER, STATE_KEYS, LocalRange

MOMENTS = STATE_KEYS[1:]


@dataclass(frozen=True)
class Replica:
    """Which of the groups that hold the same shards this rank is in."""

    index: int
    count: int
    group: dist.ProcessGroup | None
    """The ranks that hold the same shard as this one; None where it is alone."""


class Shard:
    """This rank's shard of one trainable parameter, as a plain tensor for the optimizer: DTensors cost time and need not be there.

    Args:
        parameter: the DTensor that FSDP2 holds.
        first_row: of the shard in the whole parameter.
    """

    def __init__(self, name: str, parameter: Any, first_row: int) -> None:
        self.name, self.parameter = name, parameter
        self.shape = tuple(parameter.shape)
        self.start = first_row * math.prod(self.shape[1:])
        self.values = nn.Parameter(self.local())

    def local(self) -> torch.Tensor:
        """The shard's memory. FSDP2 may move it (it pads shards of unequal size at the first forward)."""
        found: torch.Tensor = self.parameter.detach()._local_tensor
        return found

    def attach(self) -> None:
        """Let the optimizer see the shard and its gradient; none counts as zero, so that decay and momentum still apply."""
        self.values.data = self.local()
        grad = self.parameter.grad
        self.values.grad = (
            torch.zeros_like(self.values)
            if grad is None
            else grad._local_tensor.to(self.values.dtype)
        )

    def release(self) -> None:
        """Drop the gradient."""
        self.values.grad = None
        self.parameter.grad = None


class ShardRange(LocalRange):
    """The part of a shard that this rank speaks for."""

    def __init__(self, shard: Shard, optimizer: torch.optim.Optimizer, replica: Replica) -> None:
        self.name, self.shape, self._shard, self._optimizer = (
            shard.name,
            shard.shape,
            shard,
            optimizer,
        )
        self._at, end = part_of(shard.values.numel(), replica)
        self.start, self.length = shard.start + self._at, end - self._at

    def read(self, key: str) -> torch.Tensor:
        return self._view(key)

    def write(self, key: str, values: torch.Tensor) -> None:
        self._view(key).copy_(values)

    def gradient(self) -> torch.Tensor:
        grad = self._shard.parameter.grad
        return (
            torch.zeros(self.length, device=self._shard.local().device)
            if grad is None
            else self._cut(grad._local_tensor)
        )

    def _view(self, key: str) -> torch.Tensor:
        return self._cut(
            self._shard.local() if key == MASTER else self._optimizer.state[self._shard.values][key]
        )

    def _cut(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().view(-1).narrow(0, self._at, self.length)


def part_of(length: int, replica: Replica) -> tuple[int, int]:
    """First and last (exclusive) of `length` elements that a replica speaks for."""
    return replica.index * length // replica.count, (replica.index + 1) * length // replica.count


@torch.no_grad()
def exchange(shards: list[Shard], optimizer: torch.optim.Optimizer, replica: Replica) -> None:
    """Give every replica what the others loaded: each sets what it does not speak for to zero, and the sum is the whole."""
    if replica.group is None:
        return
    for shard in shards:
        first, end = part_of(shard.values.numel(), replica)
        for tensor in (shard.local(), *(optimizer.state[shard.values][key] for key in MOMENTS)):
            flat = tensor.view(-1)
            flat[:first] = 0
            flat[end:] = 0
            dist.all_reduce(flat, group=replica.group)
