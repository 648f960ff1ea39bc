"""What trains, part by part of a model: how many parameters, at which rate, with which decay."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import nn

from onellm_dist.common.text_table import format_table
from onellm_dist.config.train_sections import OptimSection
from onellm_dist.train.optim.groups import build_parameter_groups
from onellm_dist.train.optim.parts import map_parts
from onellm_dist.train.optim.rules import ParameterPlan

HEADER = ("part", "parameters", "trained", "learning rate", "weight decay")


class PartSummary(NamedTuple):
    """One part of a model in a run."""

    part: str
    """A modality (its tokenizer and projector), `upm`, `llm`, `encoder`, or `reference`: the frozen
    copies of `train.dpo.reference: copy`."""
    parameters: int
    trained: int
    """Parameters that train."""
    rates: tuple[float, ...]
    """Peak learning rates of those that train, ascending."""
    schedules: tuple[str, ...]
    """Schedules of the parameters that train."""
    decays: tuple[tuple[float, int], ...]
    """Weight decay to how many of them have it, the largest first."""
    exempt: int = 0
    """Biases and norm weights that have no decay, but would have it by the rules."""


def summarise_parts(
    model: nn.Module, optim: OptimSection, plan: ParameterPlan
) -> list[PartSummary]:
    """Summarise the parts of a model.

    Args:
        model: its parameters may be on the meta device.
        optim: the `optim` section.
        plan: what trains.
    """
    groups = {
        id(parameter): group.rate
        for group in build_parameter_groups(model, plan.rates)
        for parameter in group.parameters
    }
    planned = {id(p): plan.rates[n] for n, p in model.named_parameters() if n in plan.rates}
    parts = map_parts(model)
    owned: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        owned[parts[name]].append(parameter)
    found = []
    for part, parameters in owned.items():
        trained = [(groups[id(p)], p.numel()) for p in parameters if id(p) in groups]
        decays: dict[float, int] = defaultdict(int)
        for rate, size in trained:
            decays[rate.weight_decay] += size
        found.append(
            PartSummary(
                part,
                sum(p.numel() for p in parameters),
                sum(size for _, size in trained),
                tuple(sorted({optim.lr * rate.scale for rate, _ in trained})),
                tuple(sorted({rate.schedule for rate, _ in trained})),
                tuple(sorted(decays.items(), reverse=True)),
                sum(
                    p.numel()
                    for p in parameters
                    if id(p) in groups and planned[id(p)].weight_decay > groups[id(p)].weight_decay
                ),
            )
        )
    return found


def format_parts(parts: Sequence[PartSummary]) -> list[str]:
    """Format the table of parameters, a line for each part."""
    schedules = {name for part in parts for name in part.schedules}
    rows = [HEADER, *(_format_part(part, len(schedules) > 1) for part in parts)]
    total, trained = (sum(numbers) for numbers in zip(*(p[1:3] for p in parts), strict=True))
    rows.append(("total", f"{total:,}", f"{trained:,}", "", ""))
    return format_table(rows, right=(1, 2))


def to_json(parts: Iterable[PartSummary]) -> list[dict[str, Any]]:
    """The parts as objects of `events.jsonl`."""
    return [
        {
            "part": part.part,
            "parameters": part.parameters,
            "trained": part.trained,
            "learning_rates": [part.rates[0], part.rates[-1]] if part.rates else [],
            "schedules": list(part.schedules),
            "weight_decays": [decay for decay, _ in part.decays],
        }
        for part in parts
    ]


def _format_part(part: PartSummary, names_schedules: bool) -> tuple[str, ...]:
    if not part.trained:
        return part.part, f"{part.parameters:,}", "frozen", "-", "-"
    low, high = part.rates[0], part.rates[-1]
    rate = f"{high:g}" if low == high else f"{low:.3g} to {high:g}"
    if names_schedules:
        rate += f", {' and '.join(part.schedules)}"
    decayed = [decay for decay, _ in part.decays if decay]
    decay = ", ".join(f"{value:g}" for value in decayed) or "0"
    without = dict(part.decays).get(0.0, 0)
    if decayed and without:
        reasons = ["biases, norms"] * bool(part.exempt) + ["by rule"] * (without > part.exempt)
        decay += f", none for {without:,} ({', '.join(reasons)})"
    return part.part, f"{part.parameters:,}", f"{part.trained:,}", rate, decay
