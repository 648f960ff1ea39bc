"""What a recipe will roughly need of memory and disk.

Counted are weights, gradients, optimizer state and checkpoints; not activations and buffers.
"""

from __future__ import annotations

from dataclasses import dataclass

from onellm_dist.config.schema import RunConfig
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.optim.optimizers import make_optimizer

FLOAT_BYTES = 4
"""Checkpoints and optimizers keep fp32."""


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
    """(all parameters, those that train on all modalities of the model), without loading any.

    Raises:
        UsageError: there is no model at `model.path`, it has other span positions, or a rule of
            `train.parameters` is wrong.
    """
    from onellm_dist.model.adapters.lora import add_adapters
    from onellm_dist.model.configuration import OneLLMConfig
    from onellm_dist.model.losses.preference import prepare_preference
    from onellm_dist.model.presets import build_config, check_directory
    from onellm_dist.model.spans.positions import set_span_positions
    from onellm_dist.model.weights.lazy import build_empty_model
    from onellm_dist.train.optim.rules import prepare_parameters

    path = config.model.path
    if path is not None:
        check_directory(path)
    found = (
        build_config(str(config.model.preset))
        if path is None
        else OneLLMConfig.from_pretrained(path)
    )
    set_span_positions(found, config.model.span_positions)
    model = build_empty_model(found)
    if config.train.lora is not None:
        add_adapters(model, config.train.lora)
    prepare_parameters(model, config.train, config.optim, found.modalities)
    if config.train.preference is not None:
        prepare_preference(model, config.train.preference)
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return sum(p.numel() for p in parameters), trainable
