"""What a recipe says to an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from onellm_dist.config.schema import RunConfig
from onellm_dist.train.engine.compile_check import check_compile
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.optim.base import OptimizerComponent
from onellm_dist.train.optim.optimizers import make_optimizer


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """Everything that an engine needs to know beside the model and its parameter groups."""

    world_size: int
    device: torch.device
    bf16: bool
    """Whether the model computes in bf16; otherwise in fp32."""
    optimizer: OptimizerComponent
    grad_clip: float
    """Largest global gradient norm; 0 turns clipping off."""
    options: Any
    """What the engine's own description read from the recipe (`EngineDescription.read_options`)."""
    frozen_resident: bool = False
    """Whether every rank holds all weights that do not train (`engine.frozen`)."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Parameter name to the part of the model whose gradient norm it counts towards; other
    parameters count towards none."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the weights that the model computes with."""
        return torch.bfloat16 if self.bf16 else torch.float32


def make_settings(
    config: RunConfig,
    *,
    world_size: int,
    device: torch.device,
    parts: Mapping[str, str] | None = None,
) -> EngineSettings:
    """The settings of a recipe for this many ranks.

    Raises:
        UsageError: the engine's or the optimizer's section is wrong, or does not fit the number of
            ranks or `train.compile`.
    """
    bf16 = config.train.precision == "bf16"
    description = get_engine(config.engine.name)
    description.check(config.engine, bf16=bf16)
    check_compile(config.engine, config.train)
    return EngineSettings(
        world_size=world_size,
        device=device,
        bf16=bf16,
        optimizer=make_optimizer(config.optim),
        grad_clip=config.optim.grad_clip,
        options=description.read_options(config.engine, world_size=world_size),
        frozen_resident=config.engine.frozen == "resident",
        parts=parts or {},
    )
