"""FSDP2 (`fully_shard`; seen with torch 2.15).

It has the interface and the numbers of the DeepSpeed engine, without its JSON.

Trained weights are fp32 shards that are cast when they are gathered; gradients are reduced and kept
in fp32. Frozen weights are in the dtype that the model computes in and have no optimizer state, and
they are sharded, or complete on every rank.

Where frozen weights are resident and gradients are reduced once a step, trained weights are
gathered once a step too: they stay gathered from the first micro-batch to the last one's backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from onellm_dist.packed import PackedBatch
from onellm_dist.train.engine.base import Engine, GradNorms, LocalRange, PackedLoss, WeightSource
from onellm_dist.train.engine.fsdp.ranges import Replica, Shard, ShardRange, exchange_replicas
from onellm_dist.train.engine.fsdp.units import find_units, group_units, set_prefetch
from onellm_dist.train.engine.grad_norms import PartNorms
from onellm_dist.train.engine.parameters import (
    ParameterOwners,
    fill_groups,
    list_persistent_buffers,
    name_groups,
    set_learning_rates,
)
from onellm_dist.train.engine.settings import EngineSettings

REPLICATE = "replicate"
SHARD = "shard"


class FsdpEngine(Engine):
    """torch's optimizers over plain views of the shards: kernels and state are those of ZeRO."""

    def __init__(
        self,
        module: Any,
        groups: Sequence[dict[str, Any]],
        settings: EngineSettings,
        mesh: DeviceMesh,
    ) -> None:
        self._module = module
        self._settings = settings
        self.device = settings.device
        self.optimizer = settings.optimizer
        self._shards = [
            Shard(name, p, find_first_row(p, mesh))
            for name, p in module.model.named_parameters()
            if p.requires_grad
        ]
        # A rank may hold nothing of a small parameter; there is nothing to step then.
        self._values = {shard.name: shard.values for shard in self._shards if shard.values.numel()}
        self._torch_optimizer = settings.optimizer.build(fill_groups(groups, self._values))
        for values in self._values.values():
            settings.optimizer.add_state(self._torch_optimizer.state[values], values)
        self._steps = 0
        self._replica = find_replica(mesh)
        ranges = [ShardRange(s, self._torch_optimizer, self._replica) for s in self._shards]
        self._ranges: list[LocalRange] = [r for r in ranges if r.length]
        self._poison = torch.ones((), device=self.device)
        """NaN if a loss of this step was not finite on this rank; otherwise 1."""
        self._norms = PartNorms(module.model, self._ranges, settings.parts, self.device)
        self._known_norms: GradNorms | None = None
        """Norms of the gradient that `step` is about to apply, if they were computed."""
        options = settings.options
        self._gathers_once = settings.frozen_resident and not options.reduce_every_micro_batch
        """Whether trained weights are gathered once a step."""
        if self._gathers_once:
            # A unit that runs twice in a micro-batch would be gathered again within the last
            # backward: its first pass through there would free it.
            module.set_reshard_after_backward(False)
        self._stays_gathered = False
        """Whether what a forward pass gathers stays for its backward."""
        self._is_last = False
        """Whether the micro-batch at work is the step's last one."""

    @classmethod
    def wrap(
        cls,
        model: nn.Module,
        groups: Sequence[dict[str, Any]],
        settings: EngineSettings,
        weights: WeightSource | None = None,
    ) -> FsdpEngine:
        names = name_groups(model, groups)
        dtype = settings.compute_dtype
        resident = find_resident(model, settings)
        for parameter in model.parameters():
            # Master weights start from the rounded ones, as under ZeRO.
            parameter.data = parameter.data.to(dtype).to(
                torch.float32 if parameter.requires_grad else dtype
            )
            if parameter in resident and not parameter.is_meta:
                parameter.data = parameter.data.to(settings.device)
        mesh = make_mesh(settings)
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        module = PackedLoss(model)
        # The root is resharded too: by itself, FSDP2 keeps it gathered after a forward pass, and
        # after one without backward (validation) it would stay so until the next step.
        found, options = find_units(model, resident), settings.options
        joined, stacks = group_units(model, found, resident, options.unit_parameters)
        units: list[Any] = [*joined, [module]]
        for unit in units:
            fully_shard(
                unit if len(unit) > 1 else unit[0],
                mesh=mesh,
                mp_policy=policy,
                reshard_after_forward=True,
                ignored_params=resident,
            )
            sharded: Any = unit[0]
            # The sum over ranks, not the mean. gloo has no scaled sum, which the factor alone would
            # ask for.
            sharded.set_gradient_divide_factor(1.0)
            sharded.set_force_sum_reduction_for_comms(True)
        set_prefetch(stacks, options.prefetch)
        if weights is not None:
            fill_shards(model, weights, mesh, dtype, settings.device)
        return cls(module, names, settings, mesh)

    def forward(self, batch: PackedBatch, *, last: bool) -> tuple[torch.Tensor, ...]:
        self._keep_gathered()
        self._is_last = last
        if not self._settings.options.reduce_every_micro_batch:
            self._module.set_requires_gradient_sync(last)
            self._module.set_is_last_backward(last)
        elif self._replica.count > 1:  # with hybrid sharding the groups meet once a step
            self._module.set_requires_all_reduce(last)
        found: tuple[torch.Tensor, ...] = self._module(batch)
        return found

    def _keep_gathered(self) -> None:
        """Let weights stay gathered after a forward pass whose backward will read them.

        Without a backward (validation) they never do.
        """
        stays = self._gathers_once and torch.is_grad_enabled()
        if stays != self._stays_gathered:
            self._module.set_reshard_after_forward(not stays)
            self._stays_gathered = stays

    def _free_gathered(self) -> None:
        """Free all gathered weights; what is sharded already stays as it is."""
        for unit in self._module.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()

    @torch.no_grad()
    def logits(self, batch: PackedBatch) -> torch.Tensor:
        self._keep_gathered()
        values: torch.Tensor = self._module(batch, logits=True)
        return values

    def backward(self, loss: torch.Tensor, loss_count: int) -> None:
        # A loss that is not finite may have finite gradients: poison them with NaN, so that the
        # norm shows it everywhere.
        poison = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        self._poison = self._poison * poison
        (loss * poison / loss_count).backward()
        if self._gathers_once and self._is_last:
            self._free_gathered()

    @torch.no_grad()
    def grad_norms(self) -> GradNorms:
        if self._ranges:
            # Empty and skipped samples may reach nothing that trains: the norm must show a loss
            # that is not finite anyway.
            self._ranges[0].gradient().mul_(self._poison)
        self._poison = torch.ones_like(self._poison)
        for shard in self._shards:
            shard.attach()
        self._known_norms = self._norms.read()
        return self._known_norms

    @torch.no_grad()
    def step(self, lr: float | Sequence[float], *, discard: bool = False) -> bool:
        norm = (self._known_norms or self.grad_norms()).total
        self._known_norms = None
        applied = math.isfinite(norm) and not discard
        # A forward pass that had no backward may have left weights gathered: the next one would
        # compute with these, which are then a step old.
        self._free_gathered()
        if applied:
            self._apply(lr, norm)
        for shard in self._shards:
            shard.release()
        return applied

    def _apply(self, lr: float | Sequence[float], norm: float) -> None:
        gradients = [values.grad for values in self._values.values() if values.grad is not None]
        clip = self._settings.grad_clip
        if clip and gradients and norm + 1e-6 > clip:
            torch._foreach_mul_(gradients, clip / (norm + 1e-6))
        set_learning_rates(self._torch_optimizer.param_groups, lr)
        self._torch_optimizer.step()
        self._steps += 1

    def ranges(self) -> list[LocalRange]:
        return self._ranges

    @property
    def optimizer_steps(self) -> int:
        return self._steps

    def finish_restore(self, optimizer_steps: int) -> None:
        self._free_gathered()  # as in `step`: the shards have other values now
        self._steps = optimizer_steps
        for values in self._values.values():
            self.optimizer.set_steps(self._torch_optimizer.state[values], optimizer_steps)
        exchange_replicas(
            [shard for shard in self._shards if shard.name in self._values],
            self._torch_optimizer,
            self._replica,
            self.optimizer.state_keys,
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        return self._settings.compute_dtype

    def full_weight_shapes(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        model = self._module.model
        found = [(name, tuple(p.shape), self.compute_dtype) for name, p in model.named_parameters()]
        return found + [
            (name, tuple(b.shape), b.dtype) for name, b in list_persistent_buffers(model)
        ]

    @torch.no_grad()
    def full_weights(
        self, wants: Callable[[str], bool] = lambda _: True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        is_rank_zero = dist.get_rank() == 0
        for name, parameter in self._module.model.named_parameters():
            if not wants(name):
                continue
            full: Any = parameter.detach().to(self.compute_dtype)
            if isinstance(full, DTensor):
                full = full.full_tensor()
            yield name, full.cpu() if is_rank_zero else torch.empty_like(full, device="meta")
        for name, buffer in list_persistent_buffers(self._module.model):
            if not wants(name):
                continue
            yield (
                name,
                buffer.detach().to("cpu", copy=True)
                if is_rank_zero
                else torch.empty_like(buffer, device="meta"),
            )


def make_mesh(settings: EngineSettings) -> DeviceMesh:
    """Put all ranks in a row, or with `shard_ranks` in rows of that many neighbours.

    Each row holds a full copy of the model.
    """
    device_type = settings.device.type
    across = settings.options.shard_ranks
    if across is None or across == settings.world_size:
        return init_device_mesh(device_type, (settings.world_size,), mesh_dim_names=(SHARD,))
    return init_device_mesh(
        device_type, (settings.world_size // across, across), mesh_dim_names=(REPLICATE, SHARD)
    )


def find_replica(mesh: DeviceMesh) -> Replica:
    """Which of the groups that hold the same shards this rank is in, by the mesh."""
    if REPLICATE not in (mesh.mesh_dim_names or ()):
        return Replica(0, 1, None)
    return Replica(mesh.get_local_rank(REPLICATE), mesh.size(0), mesh.get_group(REPLICATE))


def find_resident(model: nn.Module, settings: EngineSettings) -> set[nn.Parameter]:
    """The parameters of which every rank holds all: those that do not train, if the recipe says so.

    FSDP2 leaves them alone, so that they lie where and in the dtype that they are given.
    """
    if not settings.frozen_resident:
        return set()
    return {parameter for parameter in model.parameters() if not parameter.requires_grad}


def find_first_row(parameter: DTensor, mesh: DeviceMesh) -> int:
    """First row of this rank's shard.

    Rows are split into equal chunks; the last ranks may get fewer or none.
    """
    count = mesh.size(mesh.ndim - 1)
    index = mesh.get_local_rank(mesh.ndim - 1)
    rows = parameter.shape[0]
    return min(index * -(-rows // count), rows)


@torch.no_grad()
def fill_shards(
    model: nn.Module,
    weights: WeightSource,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give every shard its memory and its rows of the weights, rounded to `dtype` as under ZeRO."""
    owners = ParameterOwners(model)
    for name, parameter in list(model.named_parameters()):
        held: Any = parameter
        if not isinstance(held, DTensor):
            owners.replace(name, _fill_whole(name, held, weights, device))
            continue
        first = find_first_row(held, mesh)
        local = torch.empty(held._local_tensor.shape, dtype=held.dtype, device=device)
        if local.numel():
            local.copy_(weights.rows(name, first, first + len(local)).to(dtype))
        sharded = DTensor.from_local(
            local,
            held.device_mesh,
            held.placements,
            run_check=False,
            shape=held.shape,
            stride=held.stride(),
        )
        owners.replace(name, nn.Parameter(sharded, requires_grad=held.requires_grad))


def _fill_whole(
    name: str, parameter: nn.Parameter, weights: WeightSource, device: torch.device
) -> nn.Parameter:
    """A parameter that is not sharded, with its weights."""
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
    if values.numel():
        values.copy_(weights.rows(name, 0, parameter.shape[0] if parameter.ndim else 0))
    return nn.Parameter(values, requires_grad=parameter.requires_grad)
