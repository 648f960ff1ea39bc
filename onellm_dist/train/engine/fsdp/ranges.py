"""What a rank holds under FSDP2: a shard of each parameter, which is a contiguous range of it.

With hybrid sharding several ranks hold the same shard. Each speaks for an equal part of it, so that
every element is held exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from onellm_dist.train.engine.base import MASTER, LocalRange


@dataclass(frozen=True)
class Replica:
    """Which of the groups that hold the same shards this rank is in."""

    index: int
    """Index of this rank's group."""
    count: int
    """Number of groups."""
    group: dist.ProcessGroup | None
    """The ranks that hold the same shard as this one; None if no other rank does."""


class Shard:
    """This rank's shard of one trainable parameter, as a plain tensor.

    DTensors would cost the optimizer time.

    Args:
        name: the parameter's name in the model.
        parameter: the DTensor that FSDP2 holds.
        first_row: index of the shard's first row in the whole parameter.
    """

    def __init__(self, name: str, parameter: Any, first_row: int) -> None:
        self.name = name
        self.parameter = parameter
        self.shape = tuple(parameter.shape)
        self.start = first_row * math.prod(self.shape[1:])
        self.values = nn.Parameter(self.local())

    def local(self) -> torch.Tensor:
        """Return the shard's memory.

        FSDP2 may move it: it pads shards of unequal size at the first forward pass.
        """
        found: torch.Tensor = self.parameter.detach()._local_tensor
        return found

    def attach(self) -> None:
        """Show the optimizer the shard and its gradient.

        A missing gradient is zero, so that decay and momentum still apply.
        """
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
    """The part of a shard that this rank speaks for.

    Args:
        shard: the shard.
        optimizer: holds the state of `shard.values`.
        replica: which of the ranks with the same shard this one is.
    """

    def __init__(self, shard: Shard, optimizer: torch.optim.Optimizer, replica: Replica) -> None:
        self._shard = shard
        self._optimizer = optimizer
        self._offset, end = get_replica_bounds(shard.values.numel(), replica)
        self.name = shard.name
        self.shape = shard.shape
        self.start = shard.start + self._offset
        self.length = end - self._offset

    def read(self, key: str) -> torch.Tensor:
        return self._view(key)

    def write(self, key: str, values: torch.Tensor) -> None:
        self._view(key).copy_(values)

    def gradient(self) -> torch.Tensor:
        grad = self._shard.parameter.grad
        if grad is None:
            return torch.zeros(self.length, device=self._shard.local().device)
        return self._cut(grad._local_tensor)

    def _view(self, key: str) -> torch.Tensor:
        return self._cut(
            self._shard.local() if key == MASTER else self._optimizer.state[self._shard.values][key]
        )

    def _cut(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().view(-1).narrow(0, self._offset, self.length)


def get_replica_bounds(length: int, replica: Replica) -> tuple[int, int]:
    """First and last (exclusive) of a shard's `length` elements that a replica speaks for."""
    return replica.index * length // replica.count, (replica.index + 1) * length // replica.count


@torch.no_grad()
def exchange_replicas(
    shards: Sequence[Shard],
    optimizer: torch.optim.Optimizer,
    replica: Replica,
    state_keys: Sequence[str],
) -> None:
    """Give every replica what the others loaded.

    Each replica zeroes what it does not speak for, and the sum over replicas is complete.
    """
    if replica.group is None:
        return
    for shard in shards:
        first, end = get_replica_bounds(shard.values.numel(), replica)
        state = optimizer.state[shard.values]
        for tensor in (shard.local(), *(state[key] for key in state_keys)):
            flat = tensor.view(-1)
            flat[:first] = 0
            flat[end:] = 0
            dist.all_reduce(flat, group=replica.group)
