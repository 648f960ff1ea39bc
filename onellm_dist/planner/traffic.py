"""What an engine's collectives move in a step."""

from __future__ import annotations

from typing import Any

from onellm_dist.config.schema import EngineSection
from onellm_dist.planner.memory import count_parameters
from onellm_dist.train.engine.description import StepTraffic, WeightUses
from onellm_dist.train.engine.select import get_engine


def compute_traffic(
    section: EngineSection, model: Any, uses: WeightUses, *, world_size: int, compute_bytes: int
) -> StepTraffic:
    """What an engine's collectives move.

    Args:
        section: the recipe's `engine` section.
        model: prepared for its stage.
        uses: weights that one of its micro-batches reads.
        world_size: number of ranks.
        compute_bytes: size of a weight that the model computes with.
    """
    engine = get_engine(section.name)
    trained, frozen = measure_padding(model, engine.row_multiple(section, world_size=world_size))
    return engine.traffic(
        section,
        world_size=world_size,
        compute_bytes=compute_bytes,
        trainable=round(count_parameters(model).trainable * trained),
        uses=uses.pad(trained=trained, frozen=frozen),
    )


def measure_padding(model: Any, multiple: int) -> tuple[float, float]:
    """How much larger trainable and frozen weights are with their rows padded to a multiple."""
    size, padded = {True: 0, False: 0}, {True: 0, False: 0}
    for parameter in model.parameters():
        count = parameter.numel()
        rows = max(1, parameter.shape[0]) if parameter.ndim else 1
        size[parameter.requires_grad] += count
        padded[parameter.requires_grad] += count // rows * -(-rows // multiple) * multiple
    trained, frozen = (padded[key] / max(1, size[key]) for key in (True, False))
    return trained, frozen
