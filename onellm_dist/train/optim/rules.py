"""Parameter rules: which parameters train, at which rate, with which decay and schedule.

The stages of the paper (section 3.3) are named sets of rules; a recipe adds its own. The reference
implementation froze nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from onellm_dist.common.errors import UsageError
from onellm_dist.common.near_names import find_near_names
from onellm_dist.config.train_sections import OptimSection, ParameterRule, TrainSection
from onellm_dist.model.adapters.lora import PATTERN as ADAPTER_PATTERN
from onellm_dist.model.losses.preference import PREFIX as COPIES
from onellm_dist.train.optim.layers import LayerPosition, map_layers

ALIGN_ROOTS = ("tokenizers", "projectors", "upm")
"""Trained in `align`: the modality tokenizers; the per-modality projections, queries, router and
tags; and the experts."""
TUNE_ROOTS = ("llm",)
"""Trained in `tune`."""
STAGE_ROOTS: Mapping[str, tuple[str, ...]] = {
    "align": ALIGN_ROOTS,
    "tune": TUNE_ROOTS,
    "joint": (*ALIGN_ROOTS, *TUNE_ROOTS),
    "custom": (),
}


class ParameterRate(NamedTuple):
    """How one parameter trains."""

    scale: float
    """Learning rate of the parameter, divided by `optim.lr`."""
    schedule: str
    weight_decay: float
    """Before biases and norm weights are exempted."""


@dataclass(frozen=True)
class ParameterPlan:
    """What trains, and how."""

    rates: Mapping[str, ParameterRate]
    """Name of each parameter that trains to how; the others are frozen."""

    def apply(self, model: nn.Module) -> None:
        """Set `requires_grad` of every parameter."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.rates)


def list_stage_rules(train: TrainSection, names: Sequence[str]) -> list[ParameterRule]:
    """The rules of `train.stage`; parts with adapters train through these alone.

    Args:
        train: the `train` section.
        names: names of all parameters.
    """
    roots = STAGE_ROOTS[train.stage]
    if train.encoder == "trainable":
        roots = (*roots, "encoder")
    rules = [ParameterRule(match=f"{root}.*") for root in roots]
    adapted = dict.fromkeys(n.split(".")[0] for n in names if fnmatchcase(n, ADAPTER_PATTERN))
    if adapted:
        rules += [ParameterRule(match=f"{root}.*", freeze=True) for root in adapted]
        rules.append(ParameterRule(match=ADAPTER_PATTERN))
    return rules


def prepare_parameters(
    model: nn.Module, train: TrainSection, optim: OptimSection, modalities: Collection[str]
) -> ParameterPlan:
    """Plan what trains, and freeze the rest.

    Args:
        model: has `tokenizers`, `projectors` (one child per modality), `upm`, `encoder` and `llm`;
            its parameters may be on the meta device.
        train: the `train` section.
        optim: the `optim` section.
        modalities: those of the mixture.

    Raises:
        UsageError: a rule matches nothing, or nothing would train.
    """
    plan = plan_parameters(model, train, optim, modalities)
    plan.apply(model)
    return plan


def plan_parameters(
    model: nn.Module, train: TrainSection, optim: OptimSection, modalities: Collection[str]
) -> ParameterPlan:
    """Apply the rules of the stage, then those of the recipe; see `prepare_parameters`.

    The parts of modalities that the mixture does not have stay frozen whatever the rules say. They
    cannot learn, would only decay, and their optimizer state is large (fMRI's tokenizer alone has
    129 M weights). The same holds for CLIP's final projection, which nothing computes with.
    """
    names = [name for name, _ in model.named_parameters() if not name.startswith(COPIES)]
    layers = map_layers(model)
    unused = find_unused(model, modalities)
    merged: dict[str, dict[str, Any]] = {}
    stage_rules = list_stage_rules(train, names)
    replaced: set[str] = set()
    for number, rule in enumerate((*stage_rules, *train.parameters)):
        if number == len(stage_rules):
            replaced = {name for name, found in merged.items() if found["freeze"]}
        matched = [name for name in names if fnmatchcase(name, rule.match)]
        frozen = {name for name in replaced if merged[name]["freeze"]}
        if number >= len(stage_rules):  # a model of pictures alone has no tokenizers to align
            check_rule(rule, matched, names, layers, frozen)
        for name in matched:
            given = rule.model_dump(exclude={"match"}, exclude_none=True)
            if not _keeps_frozen(rule, name, frozen):
                given.setdefault("freeze", False)
            merged[name] = {**merged.get(name, {}), **given}
    rates = {
        name: _make_rate(found, optim, layers.get(name))
        for name in names
        if (found := merged.get(name)) is not None and not found["freeze"] and name not in unused
    }
    if not rates:
        raise _explain_nothing(train, modalities)
    return ParameterPlan(rates)


def _keeps_frozen(rule: ParameterRule, name: str, frozen: Collection[str]) -> bool:
    """Whether a rule leaves a weight frozen that adapters train in place of."""
    return rule.freeze is None and name in frozen and bool(rule.list_settings())


def _make_rate(
    found: Mapping[str, Any], optim: OptimSection, layer: LayerPosition | None
) -> ParameterRate:
    scale = found.get("lr", optim.lr) / optim.lr
    if layer is not None:
        scale *= found.get("layer_decay", 1.0) ** layer.below_top
    return ParameterRate(
        scale=scale,
        schedule=found.get("schedule", optim.schedule),
        weight_decay=found.get("weight_decay", optim.weight_decay),
    )


def find_unused(model: nn.Module, modalities: Collection[str]) -> set[str]:
    """Names of the parameters that no sample of the mixture reaches."""
    known = set(model.get_submodule("projectors")._modules)
    found = set()
    for name, _ in model.named_parameters():
        root, owner, *_ = name.split(".")
        is_absent = root in ("tokenizers", "projectors") and owner in known - set(modalities)
        is_idle = root == "upm" and not modalities
        if is_absent or is_idle or (root, owner) == ("encoder", "proj"):
            found.add(name)
    return found


def check_rule(
    rule: ParameterRule,
    matched: Sequence[str],
    names: Sequence[str],
    layers: Mapping[str, LayerPosition],
    frozen: Collection[str],
) -> None:
    """Refuse a rule that does nothing.

    Args:
        rule: the rule.
        matched: names of the parameters that it matches.
        names: names of all parameters.
        layers: where parameters of parts with transformer blocks stand.
        frozen: names of those that adapters train in place of.

    Raises:
        UsageError: it matches nothing, asks for layer-wise rates where there are no layers, or
            says how parameters train that stay frozen.
    """
    if not matched:
        near = find_near_names(rule.match, names)
        raise UsageError(
            f"train.parameters: {rule.match} matches no parameter of the model",
            "the rule would do nothing.",
            f"did you mean {' or '.join(near)}?"
            if near
            else f"the parts of the model: {', '.join(sorted({n.split('.')[0] for n in names}))}.",
        )
    if rule.layer_decay not in (None, 1.0) and not any(name in layers for name in matched):
        raise UsageError(
            f"train.parameters: {rule.match} has a layer_decay and matches nothing in encoder, UPM "
            "or LLM",
            "other parts have no transformer blocks whose rates could differ.",
            "remove layer_decay from the rule, or match one of these parts.",
        )
    if all(_keeps_frozen(rule, name, frozen) for name in matched):
        raise UsageError(
            f"train.parameters: {rule.match} sets {', '.join(rule.list_settings())} of weights "
            "that train.lora keeps frozen",
            "the rule would do nothing.",
            "add `freeze: false` to the rule if they are to train beside the adapters; the "
            "adapters themselves are *.lora_*.",
        )


def _explain_nothing(train: TrainSection, modalities: Collection[str]) -> UsageError:
    if not modalities and train.stage in ("align", "joint"):
        return UsageError(
            "no dataset of the mixture has a modality",
            f"in the stage {train.stage} nothing could train on text alone.",
            "add a dataset with a modality to data.mixture, or set train.stage=tune.",
        )
    return UsageError(
        f"nothing trains: by train.stage={train.stage} and train.parameters every parameter that "
        "a sample reaches is frozen",
        "a run without trainable parameters learns nothing.",
        "add a rule to train.parameters, or set train.stage to align, tune or joint.",
    )
