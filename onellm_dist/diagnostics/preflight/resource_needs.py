"""What a recipe will roughly need of memory and disk.

Counted are weights, gradients, optimizer state and checkpoints; not activations and buffers.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import RunConfig
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.optim.optimizers import make_optimizer

FLOAT_BYTES = 4
"""Checkpoints and optimizers keep fp32."""
FROZEN_IN_ALIGN = ("llm.", "encoder.")


@dataclass(frozen=True)
class ResourceNeeds:
    """Numbers of parameters, and bytes."""

    parameters: int
    trainable: int
    gpu: int
    """A rank's share of weights, gradients and optimizer state on its device, without
    activations."""
    host: int
    """A rank's share in the node's memory (offload, or a run on CPUs)."""
    checkpoint: int
    """One checkpoint: the trainable weights and their optimizer state in fp32."""
    disk: int
    """All checkpoints that are kept, one being written, and the final model."""


def estimate_needs(config: RunConfig, world_size: int, *, gpus: bool) -> ResourceNeeds:
    """Estimate what a run needs.

    Args:
        config: the recipe.
        world_size: number of ranks.
        gpus: whether ranks run on GPUs.

    Raises:
        UsageError: the model or the engine's configuration is missing.
    """
    total, trainable = count_parameters(config)
    compute_bytes = 2 if config.train.precision == "bf16" else 4
    state_bytes = FLOAT_BYTES * (1 + len(make_optimizer(config.optim).state_keys))
    size = get_engine(config.engine.name).parameter_bytes(
        config.engine,
        world_size=world_size,
        compute_bytes=compute_bytes,
        state_bytes=state_bytes,
    )
    on_device = (total - trainable) * size.frozen + trainable * size.trainable
    on_host = trainable * size.trainable_host
    if not gpus:
        on_host += on_device
        on_device = 0.0
    checkpoint = trainable * state_bytes
    return ResourceNeeds(
        parameters=total,
        trainable=trainable,
        gpu=int(on_device),
        host=int(on_host),
        checkpoint=checkpoint,
        disk=checkpoint * (config.checkpoint.keep + 1) + total * compute_bytes,
    )


def count_parameters(config: RunConfig) -> tuple[int, int]:
    """(all parameters, those that train), without loading any.

    Raises:
        UsageError: there is no model at `model.path`.
    """
    if config.model.path is not None:
        sizes = _read_sizes(config.model.path)
    else:
        sizes = _get_preset_sizes(str(config.model.preset))
    total = sum(sizes.values())
    if config.train.stage == "align":
        frozen = sum(size for name, size in sizes.items() if name.startswith(FROZEN_IN_ALIGN))
        return total, total - frozen
    return total, sum(size for name, size in sizes.items() if name.startswith("llm."))


def _get_preset_sizes(preset: str) -> dict[str, int]:
    from onellm_dist.model.presets import build_meta_model

    return {name: p.numel() for name, p in build_meta_model(preset).named_parameters()}


def _read_sizes(path: Path) -> dict[str, int]:
    """Sizes from the headers of safetensors files (8 bytes of length, then JSON)."""
    sizes: dict[str, int] = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as source:
            header = json.loads(source.read(struct.unpack("<Q", source.read(8))[0]))
        for name, about in header.items():
            if name != "__metadata__":
                sizes[name] = math.prod(about["shape"])
    if not sizes:
        raise UsageError(
            f"no model in {path}",
            "it has no safetensors files.",
            "convert or assemble one first (onellm convert).",
        )
    return sizes
