"""The table of parameters: what trains by a recipe, part by part."""

from __future__ import annotations

from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.corpus import open_datasets
from onellm_dist.model.lora import add_adapters
from onellm_dist.train.optim.part_summary import format_parts, summarize_parts
from onellm_dist.train.optim.rules import prepare_parameters


def format_parameters(config: RunConfig, model: Any) -> list[str]:
    """Format the table of parameters. The model is frozen as the recipe wants it.

    Args:
        config: the recipe.
        model: its model, whose parameters may be on the meta device.

    Raises:
        UsageError: a rule matches nothing, or nothing would train.
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
    parts = summarize_parts(model, config.optim, plan)
    return [f"  {line}" for line in (*format_parts(parts), *notes)]
