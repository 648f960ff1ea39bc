"""The table of parameters: what trains in the stage of a recipe, part by part."""

from __future__ import annotations

from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.text_table import format_table
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.corpus import open_datasets
from onellm_dist.train.optim.part_summary import PartSummary, summarize_parts
from onellm_dist.train.optim.stages import freeze_for_stage

HEADER = ("part", "parameters", "trained", "learning rate", "weight decay")


def format_parameters(config: RunConfig, model: Any) -> list[str]:
    """Format the table of parameters. The model is frozen as its stage wants it.

    Args:
        config: the recipe.
        model: its model, whose parameters may be on the meta device.

    Raises:
        UsageError: nothing would train.
    """
    known, notes = list(model.config.modalities), []
    try:
        datasets = open_datasets(config.data, known)
        modalities = {name for dataset in datasets for name in dataset.modalities}
    except UsageError:
        modalities = set(known)
        notes = ["(for all modalities of the model, as the datasets cannot be opened)"]
    train = config.train
    freeze_for_stage(model, train.stage, modalities, encoder=train.encoder == "trainable")
    parts = summarize_parts(model, config.optim)
    rows = [HEADER, *map(_format_part, parts), _format_total(parts)]
    return [f"  {line}" for line in (*format_table(rows, right=(1, 2)), *notes)]


def _format_part(part: PartSummary) -> tuple[str, ...]:
    if not part.trained:
        return part.part, f"{part.parameters:,}", "frozen", "-", "-"
    exempt = part.trained - part.decayed
    decay = f"{part.weight_decay:g}"
    if part.weight_decay and exempt:
        decay += f", none for {exempt:,} (biases, norms)"
    return part.part, f"{part.parameters:,}", f"{part.trained:,}", f"{part.lr:g}", decay


def _format_total(parts: list[PartSummary]) -> tuple[str, ...]:
    total, trained = (sum(numbers) for numbers in zip(*(p[1:3] for p in parts), strict=True))
    return "total", f"{total:,}", f"{trained:,}", "", ""
