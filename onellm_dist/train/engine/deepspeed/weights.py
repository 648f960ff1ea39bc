"""Filling a model on the meta device for DeepSpeed, which refuses meta tensors (0.19.8).

Under ZeRO-3 each parameter is created, partitioned and freed before the next one is created, so
that a rank holds its share and one complete parameter at most. The other stages keep all weights on
every rank anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from onellm_dist.train.engine.base import WeightSource
from onellm_dist.train.engine.parameters import ParameterOwners


@torch.no_grad()
def fill_partitioned(
    model: nn.Module,
    weights: WeightSource,
    config: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    deepspeed: Any,
) -> None:
    """Fill a model for ZeRO-3, as `zero.Init` does when a module is built.

    Here parameters have values, and there is one of them at a time.
    """
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config, dtype=dtype)
    for parameter in _create_parameters(model, weights, dtype, torch.device("cpu")):
        init._convert_to_zero_parameters([parameter])
    for (
        module
    ) in model.modules():  # `deepspeed.initialize` moves no module that has partitioned parameters
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


@torch.no_grad()
def fill_replicated(
    model: nn.Module, weights: WeightSource, dtype: torch.dtype, device: torch.device
) -> None:
    """Fill a model for ZeRO-0 to 2: every rank gets all weights."""
    for _ in _create_parameters(model, weights, dtype, device):
        pass


def _create_parameters(
    model: nn.Module, weights: WeightSource, dtype: torch.dtype, device: torch.device
) -> Iterator[nn.Parameter]:
    """Replace each parameter by a real one and yield it; rank 0 alone gives it values."""
    owners = ParameterOwners(model)
    for name, parameter in list(model.named_parameters()):
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        if dist.get_rank() == 0:
            values.copy_(weights.rows(name, 0, parameter.shape[0] if parameter.ndim else 0))
        filled = nn.Parameter(values, requires_grad=parameter.requires_grad)
        del values
        owners.replace(name, filled)
        yield filled
