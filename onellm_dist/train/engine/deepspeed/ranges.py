"""Which elements this rank's optimizer holds, under each of DeepSpeed's optimizers (0.19.8).

ZeRO-3 holds one equal range of every parameter, reached through what DeepSpeed's public
`safe_*_local_*` functions call. ZeRO-1 and 2 flatten a group, cut it into equal partitions and
record where each parameter lies in them (`_hp_mapping`). Without ZeRO every rank holds everything,
and each claims an equal range.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from onellm_dist.train.engine.base import MASTER, LocalRange
from onellm_dist.train.optim.base import OptimizerComponent


def find_flat_partitions(engine: Any, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return the tensors that the optimizer really steps on this rank, in a fixed order."""
    zero = engine.optimizer
    for attribute in (
        "fp32_partitioned_groups_flat",  # ZeRO-3
        "single_partition_of_fp32_groups",  # ZeRO-1 and 2
        "fp32_groups_flat_partition",  # ZeRO-1 in bf16
    ):
        if hasattr(zero, attribute):
            return list(getattr(zero, attribute))
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def add_optimizer_state(
    component: OptimizerComponent, optimizer: torch.optim.Optimizer, flats: list[torch.Tensor]
) -> None:
    """Create the optimizer's state as its first step would: fresh and resumed runs look alike."""
    for flat in flats:
        component.add_state(optimizer.state[flat], flat)


def find_local_ranges(
    engine: Any,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    flats: list[torch.Tensor],
    *,
    rank: int,
    world_size: int,
) -> list[LocalRange]:
    """Return this rank's ranges, in the order of the parameters; empty ones are left out."""
    found: list[LocalRange] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        own: LocalRange | None
        if hasattr(parameter, "ds_id"):
            own = _Zero3Range(name, parameter, rank, world_size)
        elif hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            own = (
                None
                if mapping is None
                else _FragmentRange(name, parameter, flats[mapping.param_group_index], optimizer)
            )
        else:
            own = _ReplicatedRange(name, parameter, optimizer, rank, world_size)
        if own is not None and own.length > 0:
            found.append(own)
    return found


@torch.no_grad()
def refresh_weights(engine: Any, state_keys: Sequence[str]) -> None:
    """Copy the fp32 weights into those that the model computes with, as the end of a step does."""
    zero = engine.optimizer
    if hasattr(zero, "update_lp_params"):  # ZeRO-1 and 2
        zero.update_lp_params()
    elif hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3
        for group in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if len(zero.persistent_parameters) > 0:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()
    # Without ZeRO the model computes with the very tensors that were written, but each rank wrote
    # only its own range.
    elif torch.distributed.get_world_size() > 1:
        _exchange_replicas(engine, state_keys)


class _Zero3Range(LocalRange):
    def __init__(self, name: str, parameter: Any, rank: int, world_size: int) -> None:
        self.name = name
        self.shape = tuple(parameter.ds_shape)
        self._parameter = parameter
        self._padded = parameter.partition_numel()
        self.start = min(rank * self._padded, parameter.ds_numel)
        self.length = min(self._padded, parameter.ds_numel - self.start)

    def read(self, key: str) -> torch.Tensor:
        # What DeepSpeed's public `safe_get_local_*` return, before they bring an offloaded state to
        # the GPU, where it need not fit.
        padded, _ = self._parameter._z3_optimizer._get_fp32_opt_state_partition(
            self._parameter,
            release_swap_buffers=True,
            optim_state_key=None if key == MASTER else key,
        )
        found: torch.Tensor = padded.detach()[: self.length]
        return found

    def write(self, key: str, values: torch.Tensor) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        padded = torch.zeros(self._padded, dtype=values.dtype)
        padded[: self.length] = values
        if key == MASTER:
            safe_set_local_fp32_param(self._parameter, padded)
        else:
            safe_set_local_optimizer_state(self._parameter, padded, key)

    def gradient(self) -> torch.Tensor:
        from deepspeed.utils import safe_get_local_grad

        found: torch.Tensor = safe_get_local_grad(self._parameter)[: self.length]
        return found


class _ViewRange(LocalRange):
    """A range whose values are views of live memory."""

    @abstractmethod
    def _view(self, key: str) -> torch.Tensor:
        """[length]: the values of `key`, in place."""

    def read(self, key: str) -> torch.Tensor:
        return self._view(key)

    def write(self, key: str, values: torch.Tensor) -> None:
        self._view(key).copy_(values)


class _FragmentRange(_ViewRange):
    """A parameter's fragment of this rank's flat partition (ZeRO-1 and 2)."""

    def __init__(
        self, name: str, parameter: Any, flat: torch.Tensor, optimizer: torch.optim.Optimizer
    ) -> None:
        mapping = parameter._hp_mapping
        self.name = name
        self.shape = tuple(parameter.shape)
        self.start = mapping.lp_fragment_address.start
        self.length = mapping.lp_fragment_address.numel
        self._parameter = parameter
        self._flat = flat
        self._optimizer = optimizer
        self._offset = mapping.hp_fragment_address.start

    def _view(self, key: str) -> torch.Tensor:
        source = self._flat if key == MASTER else self._optimizer.state[self._flat][key]
        return source.detach().narrow(0, self._offset, self.length)

    def gradient(self) -> torch.Tensor:
        found: torch.Tensor = (
            self._parameter._hp_mapping.get_lp_grad_fragment(self._parameter._index_in_param_group)
            .detach()
            .view(-1)
        )
        # ZeRO-1 in bf16 keeps the gradient of the whole parameter.
        return found if len(found) == self.length else found.narrow(0, self.start, self.length)


class _ReplicatedRange(_ViewRange):
    """Without ZeRO: rank r of n speaks for the r-th of n equal ranges."""

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        optimizer: torch.optim.Optimizer,
        rank: int,
        world_size: int,
    ) -> None:
        self.name = name
        self.shape = tuple(parameter.shape)
        self._parameter = parameter
        self._optimizer = optimizer
        self.start = rank * parameter.numel() // world_size
        self.length = (rank + 1) * parameter.numel() // world_size - self.start

    def _view(self, key: str) -> torch.Tensor:
        source = self._parameter if key == MASTER else self._optimizer.state[self._parameter][key]
        return source.detach().view(-1).narrow(0, self.start, self.length)

    def gradient(self) -> torch.Tensor:
        if self._parameter.grad is None:
            return torch.zeros(self.length, device=self._parameter.device)
        return self._parameter.grad.detach().reshape(-1).narrow(0, self.start, self.length)


def _exchange_replicas(engine: Any, state_keys: Sequence[str]) -> None:
    """Give every rank the ranges that the others loaded.

    Each rank zeroes what is not its own, and the sum over ranks is complete.
    """
    optimizer = engine.optimizer
    rank = torch.distributed.get_rank()
    world_size = torch.distributed.get_world_size()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            first = rank * parameter.numel() // world_size
            end = (rank + 1) * parameter.numel() // world_size
            for tensor in (parameter, *(optimizer.state[parameter][key] for key in state_keys)):
                flat = tensor.detach().view(-1)
                flat[:first] = 0
                flat[end:] = 0
                torch.distributed.all_reduce(flat)
