"""The table of parameters: what trains by a recipe, part by part."""

from __future__ import annotations

from typing import Any

import torch

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.corpus import open_datasets
from onellm_dist.model.adapters.lora import add_adapters
from onellm_dist.model.losses.preference import prepare_preference
from onellm_dist.model.quantised.float8 import describe_products
from onellm_dist.model.quantised.linear import FLOAT8_FORMAT, choose_layers
from onellm_dist.train.optim.part_summary import format_parts, summarise_parts
from onellm_dist.train.optim.rules import prepare_parameters


def format_parameters(config: RunConfig, model: Any) -> list[str]:
    """Format the table of parameters. The model is frozen as the recipe wants it.

    Args:
        config: the recipe.
        model: its model, whose parameters may be on the meta device.

    Raises:
        UsageError: a rule matches nothing, nothing would train, or nothing can be rounded as
            `engine.frozen_weights` says.
    """
    known, notes = list(model.config.modalities), []
    try:
        datasets = open_datasets(config.data, known)
        modalities = {name for dataset in datasets for name in dataset.modalities}
    except UsageError:
        modalities = set(known)
        notes = ["(for all modalities of the model, as the datasets cannot be opened)"]
    if config.train.lora is not None:
        add_adapters(model, config.train.lora)
    plan = prepare_parameters(model, config.train, config.optim, modalities)
    if config.train.preference is not None:
        prepare_preference(model, config.train.preference)
    parts = summarise_parts(model, config.optim, plan)
    notes += describe_frozen_weights(config, model)
    return [f"  {line}" for line in (*format_parts(parts), *notes)]


def describe_frozen_weights(config: RunConfig, model: Any) -> list[str]:
    """What `engine.frozen_weights` does to a model, in lines; [] if they stay plain.

    Args:
        config: the recipe.
        model: its model, with what does not train frozen.

    Raises:
        UsageError: the LLM has no layer that it could round.
    """
    format = config.engine.frozen_weights
    if format == "plain":
        return []
    layers = choose_layers(model, format).values()
    frozen = sum(p.numel() for p in model.llm.parameters() if not p.requires_grad)
    share = sum(layer.weight.numel() for layer in layers) / frozen
    line = (
        f"engine.frozen_weights={format}: {format_count(len(layers), 'linear layer')} of the LLM "
        f"({share:.1%} of its frozen weights), rounded at the start"
    )
    if format != FLOAT8_FORMAT:
        return [line]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    return [f"{line}; on this machine {describe_products(device, dtype)}"]
