"""A model without an optimizer, sharded over the ranks of a process group to answer questions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from onellm_dist.train.engine.base import ShardedModel, WeightSource
from onellm_dist.train.engine.fsdp.engine import SHARD, fill_shards
from onellm_dist.train.engine.fsdp.units import find_units


class _RootCall(nn.Module):
    """The root of the sharded modules: what belongs to no block is gathered while a call runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[], Any]) -> Any:
        return call()


class FsdpModel(ShardedModel):
    """FSDP2 over all ranks of the default process group."""

    def __init__(
        self, model: nn.Module, weights: WeightSource, device: torch.device, dtype: torch.dtype
    ) -> None:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=(SHARD,))
        model.requires_grad_(False).to(dtype)
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        self._root = _RootCall(model)
        for unit in (*find_units(model), self._root):
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        fill_shards(model, weights, mesh, dtype, device)
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, buffer.to(device))
        self.model = model.eval()

    @torch.inference_mode()
    def run(self, call: Callable[[], Any]) -> Any:
        return self._root(call)

    def count_weights(self) -> tuple[int, int]:
        held = whole = 0
        for parameter in self.model.parameters():
            shard: Any = parameter
            whole += parameter.numel()
            held += shard.to_local().numel() if isinstance(shard, DTensor) else shard.numel()
        return held, whole
