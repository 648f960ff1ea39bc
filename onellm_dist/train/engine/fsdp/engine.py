"""FSDP2 (`fully_shard`; seen with torch 2.15). The interface and the numbers of the DeepSpeed engine, without its JSON.

Trained weights are fp32 shards that are cast when they are gathered; gradients are reduced and kept in fp32. Frozen weights are sharded in
the dtype the model computes in and have no optimizer state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from onellm_dist.packed import PackedBatch
from onellm_dist.train.engine.base import (
    Engine,
    EngineSettings,
    GradNorms,
    LocalRange,
    PackedLoss,
    WeightSource,
)
from onellm_dist.train.engine.fsdp.ranges import MOMENTS, Replica, Shard, ShardRange, exchange
from onellm_dist.train.engine.grad_norms import PartNorms
from onellm_dist.train.engine.parameters import Places, grouped, named_groups, persistent_buffers

REPLICATE, SHARD = "replicate", "shard"


class FsdpEngine(Engine):
    """torch's fused AdamW over plain views of the shards, as under DeepSpeed: the same kernel, the same three tensors of state."""

    def __init__(
        self,
        module: Any,
        groups: Sequence[dict[str, object]],
        settings: EngineSettings,
        mesh: DeviceMesh,
    ) -> None:
        self._module, self._settings = module, settings
        self.device = settings.device
        self._shards = [
            Shard(n, p, first_row(p, mesh))
            for n, p in module.model.named_parameters()
            if p.requires_grad
        ]
        # Ranks may hold nothing of a small parameter: there is nothing to step then.
        self._values = {shard.name: shard.values for shard in self._shards if shard.values.numel()}
        self._optimizer = torch.optim.AdamW(
            grouped(groups, self._values),
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )
        for values in (
            self._values.values()
        ):  # as the first step would: a fresh and a resumed run then look alike
            self._optimizer.state[values].update(
                step=torch.zeros((), dtype=torch.float32, device=self.device),
                **{key: torch.zeros_like(values, requires_grad=False) for key in MOMENTS},
            )
        self._steps = 0
        self._replica = Replica(0, 1, None)
        if REPLICATE in (mesh.mesh_dim_names or ()):
            self._replica = Replica(
                mesh.get_local_rank(REPLICATE), mesh.size(0), mesh.get_group(REPLICATE)
            )
        made = [ShardRange(shard, self._optimizer, self._replica) for shard in self._shards]
        self._ranges: list[LocalRange] = [r for r in made if r.length]
        self._sound = torch.ones((), device=self.device)
        """NaN where a loss of this step was not finite on this rank."""
        self._norms = PartNorms(module.model, self._ranges, settings.parts, self.device)
        self._known: GradNorms | None = None
        """Of the gradient that `step` is about to apply, where it was asked for."""

    @classmethod
    def wrap(
        cls,
        model: nn.Module,
        groups: Sequence[dict[str, object]],
        settings: EngineSettings,
        weights: WeightSource | None = None,
    ) -> FsdpEngine:
        names = named_groups(model, groups)
        dtype = torch.bfloat16 if settings.bf16 else torch.float32
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).to(
                torch.float32 if parameter.requires_grad else dtype
            )
        mesh = make_mesh(settings)
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        module = PackedLoss(model)
        # A root that stayed gathered would go on with old weights after a forward without a backward (validation): shard it again too.
        for unit in (*units(model), module):
            made: Any = fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            # The sum over ranks and no mean. gloo has no scaled sum, which the factor alone would ask for.
            made.set_gradient_divide_factor(1.0)
            made.set_force_sum_reduction_for_comms(True)
        if weights is not None:
            fill(model, weights, mesh, dtype, settings.device)
        return cls(module, names, settings, mesh)

    def forward(
        self, batch: PackedBatch, *, last: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self._settings.reduce_every_micro_batch:
            self._module.set_requires_gradient_sync(last)
            self._module.set_is_last_backward(last)
        elif self._replica.count > 1:  # with hybrid sharding the groups meet once a step
            self._module.set_requires_all_reduce(last)
        loss, nll, sample_index = self._module(batch)
        return loss, nll, sample_index

    @torch.no_grad()
    def logits(self, batch: PackedBatch) -> torch.Tensor:
        values: torch.Tensor = self._module(batch, logits=True)
        return values

    def backward(self, loss: torch.Tensor, global_valid_tokens: int) -> None:
        # A loss that is not finite may have finite gradients: spoil them, so that the norm shows it on every rank.
        sound = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
        self._sound = self._sound * sound
        (loss * sound / global_valid_tokens).backward()

    @torch.no_grad()
    def grad_norms(self) -> GradNorms:
        if self._ranges:  # dummies and skipped_samples may reach nothing that trains: what the loss says must be in the norm all the same
            self._ranges[0].gradient().mul_(self._sound)
        self._sound = torch.ones_like(self._sound)
        for shard in self._shards:
            shard.attach()
        self._known = self._norms.read()
        return self._known

    @torch.no_grad()
    def step(self, lr: float, *, discard: bool = False) -> bool:
        norm = (self._known or self.grad_norms()).whole
        self._known = None
        applied = math.isfinite(norm) and not discard
        if applied:
            self._apply(lr, norm)
        for shard in self._shards:
            shard.release()
        return applied

    def _apply(self, lr: float, norm: float) -> None:
        gradients = [values.grad for values in self._values.values() if values.grad is not None]
        clip = self._settings.grad_clip
        if clip and gradients and norm + 1e-6 > clip:
            torch._foreach_mul_(gradients, clip / (norm + 1e-6))
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._steps += 1

    def ranges(self) -> list[LocalRange]:
        return self._ranges

    @property
    def optimizer_steps(self) -> int:
        return self._steps

    def restored(self, optimizer_steps: int) -> None:
        self._steps = optimizer_steps
        for values in self._values.values():
            self._optimizer.state[values]["step"].fill_(optimizer_steps)
        exchange(
            [shard for shard in self._shards if shard.name in self._values],
            self._optimizer,
            self._replica,
        )

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self._settings.bf16 else torch.float32

    def whole_shapes(self) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        found = [
            (name, tuple(p.shape), self.compute_dtype)
            for name, p in self._module.model.named_parameters()
        ]
        return found + [
            (name, tuple(b.shape), b.dtype) for name, b in persistent_buffers(self._module.model)
        ]

    @torch.no_grad()
    def whole_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        main = dist.get_rank() == 0
        for name, parameter in self._module.model.named_parameters():
            whole = parameter.detach().to(self.compute_dtype).full_tensor()
            yield name, whole.cpu() if main else torch.empty_like(whole, device="meta")
        for name, buffer in persistent_buffers(self._module.model):
            yield (
                name,
                buffer.detach().to("cpu", copy=True)
                if main
                else torch.empty_like(buffer, device="meta"),
            )


def make_mesh(settings: EngineSettings) -> DeviceMesh:
    """All ranks in a row, or with `shard_ranks` in rows of so many neighbours, each row holding a whole copy."""
    kind, across = settings.device.type, settings.shard_ranks
    if across is None or across == settings.world:
        return init_device_mesh(kind, (settings.world,), mesh_dim_names=(SHARD,))
    return init_device_mesh(
        kind, (settings.world // across, across), mesh_dim_names=(REPLICATE, SHARD)
    )


def units(model: Any) -> list[nn.Module]:
    """The modules that are gathered and let go together, inner ones first: what the model and its parts call indivisible
    (transformers' `_no_split_modules`), and embedding and head where their weights are not tied. The rest is gathered with the root.
    """
    indivisible = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    found = [module for module in model.modules() if type(module).__name__ in indivisible]
    if hasattr(model, "get_input_embeddings"):
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        if ends[0].weight is not ends[1].weight:
            found += ends
    return found


def first_row(parameter: DTensor, mesh: DeviceMesh) -> int:
    """The first row of this rank's shard: rows are dealt in equal chunks, the last ranks may get fewer or none."""
    count, index = mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
    rows = parameter.shape[0]
    return min(index * -(-rows // count), rows)


@torch.no_grad()
def fill(
    model: nn.Module,
    weights: WeightSource,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give every shard its memory and its rows of the weights, rounded to `dtype` as ZeRO's weights are."""
    places = Places(model)
    for name, parameter in list(model.named_parameters()):
        held: Any = parameter
        first = first_row(held, mesh)
        local = torch.empty(held._local_tensor.shape, dtype=held.dtype, device=device)
        if local.numel():
            local.copy_(weights.rows(name, first, first + len(local)).to(dtype))
        whole = DTensor.from_local(
            local,
            held.device_mesh,
            held.placements,
            run_check=False,
            shape=held.shape,
            stride=held.stride(),
        )
        places.put(name, nn.Parameter(whole, requires_grad=held.requires_grad))
