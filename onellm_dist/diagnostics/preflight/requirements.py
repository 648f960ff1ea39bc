"""What a recipe will need of memory and disk, roughly: weights, gradients, optimizer state, checkpoints. No activations, no buffers."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import RunConfig

FP32_BYTES = 4
FROZEN_IN_ALIGN = ("llm.", "encoder.")


@dataclass(frozen=True)
class Needs:
    """Bytes."""

    parameters: int
    trainable: int
    gpu: int
    """A rank's share of weights, gradients and optimizer state on its device; activations come on top."""
    host: int
    """A rank's share in the node's memory (offload, or a run on CPUs)."""
    checkpoint: int
    """One checkpoint: the trainable state in fp32."""
    disk: int
    """All checkpoints that are kept, one being written, and the model at the end."""


def needs_of(config: RunConfig, world: int, *, gpus: bool) -> Needs:
    """The estimate for `world` ranks.

    Raises:
        UsageError: the model or the engine's configuration is not there.
    """
    from onellm_dist.train.engine.select import get_engine
    from onellm_dist.train.optim.optimizers import make_optimizer

    total, trainable = parameters_of(config)
    width = 2 if config.train.precision == "bf16" else 4
    state = FP32_BYTES * (1 + len(make_optimizer(config.optim).state_keys))
    per_parameter = get_engine(config.engine.name).parameter_bytes(
        config.engine, world_size=world, compute_bytes=width, state_bytes=state
    )
    on_device = (total - trainable) * per_parameter.frozen + trainable * per_parameter.trainable
    on_host = trainable * per_parameter.trainable_host
    if not gpus:
        on_device, on_host = 0.0, on_device + on_host
    checkpoint = trainable * state
    return Needs(
        total,
        trainable,
        int(on_device),
        int(on_host),
        checkpoint,
        checkpoint * (config.checkpoint.keep + 1) + total * width,
    )


def parameters_of(config: RunConfig) -> tuple[int, int]:
    """(all parameters, those that train), without loading any.

    Raises:
        UsageError: no model at `model.path`.
    """
    sizes = (
        _of_directory(config.model.path)
        if config.model.path is not None
        else _of_preset(str(config.model.preset))
    )
    frozen = sum(size for name, size in sizes.items() if name.startswith(FROZEN_IN_ALIGN))
    llm = sum(size for name, size in sizes.items() if name.startswith("llm."))
    total = sum(sizes.values())
    return total, total - frozen if config.train.stage == "align" else llm


def _of_preset(preset: str) -> dict[str, int]:
    from onellm_dist.model.presets import build_meta_model

    return {name: p.numel() for name, p in build_meta_model(preset).named_parameters()}


def _of_directory(path: Path) -> dict[str, int]:
    """Sizes from the headers of a directory's safetensors files (8 bytes of length, then JSON)."""
    found: dict[str, int] = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as source:
            header = json.loads(source.read(struct.unpack("<Q", source.read(8))[0]))
        for name, about in header.items():
            if name != "__metadata__":
                size = 1
                for length in about["shape"]:
                    size *= length
                found[name] = size
    if not found:
        raise UsageError(
            f"no model in {path}",
            "it has no safetensors files.",
            "convert or assemble one first: docs/conversion.md.",
        )
    return found
