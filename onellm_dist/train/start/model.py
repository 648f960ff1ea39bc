"""The model of a run: prepared for what trains, and sharded over the ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import RunConfig
from onellm_dist.modalities import all_modalities
from onellm_dist.model.adapters.lora import AdapterWeights, add_adapters
from onellm_dist.model.compiled_blocks import compile_blocks
from onellm_dist.model.losses.preference import list_copies, prepare_preference
from onellm_dist.model.modality_tokens import find_idle_passes
from onellm_dist.model.model_kernels import KernelChoice, set_kernels
from onellm_dist.model.quantised.linear import quantise_layers
from onellm_dist.model.recompute import enable_activation_checkpointing
from onellm_dist.model.weights.lazy import InitialWeights
from onellm_dist.train.engine.base import Engine, WeightSource
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.engine.settings import EngineSettings
from onellm_dist.train.optim.groups import build_parameter_groups
from onellm_dist.train.optim.part_summary import PartSummary, summarise_parts
from onellm_dist.train.optim.parts import find_copies, map_parts
from onellm_dist.train.optim.rules import ParameterPlan, ParameterRate, prepare_parameters
from onellm_dist.train.start.inputs import Inputs
from onellm_dist.train.start.session import Session


@dataclass(frozen=True)
class PreparedModel:
    """A model that is ready for the engine."""

    model: Any
    weights: WeightSource
    parameters: ParameterPlan
    """What trains, and how."""
    parts: list[PartSummary]
    """What trains, and how, part by part."""
    kernels: KernelChoice


def prepare_model(
    config: RunConfig, *, inputs: Inputs, weights: InitialWeights, device_type: str
) -> PreparedModel:
    """Add adapters, freeze what does not train, copy image's parts; set loss and kernels.

    Args:
        config: the recipe.
        inputs: what this start has read; its model is changed.
        weights: where the weights of the model come from.
        device_type: type of the device that computes.

    Raises:
        UsageError: a rule matches nothing, nothing would train, new rows of span positions would
            not, the recipe names a modality or loss that does not exist, or nothing can be
            compiled here.
    """
    model, train = inputs.model, config.train
    if config.model.init_from_image:
        # On a resume the checkpoint replaces what trains; frozen copies are not in it.
        image = next(iter(all_modalities()))
        weights.copy(find_copies(model, image, config.model.init_from_image))
    source: WeightSource = weights
    if train.lora is not None:
        add_adapters(model, train.lora)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        source = AdapterWeights(weights, shapes, config.run.seed)
    parameters = prepare_parameters(model, train, config.optim, inputs.modalities)
    _check_new_rows(weights.zeros, parameters)
    model.idle_passes = find_idle_passes(model, inputs.all_modalities)
    if train.preference is None:
        model.set_loss(train.loss)
    else:
        prepare_preference(model, train.preference)
        weights.copy(list_copies(model))
    kernels = set_kernels(model, train.kernels, device_type)
    if train.compile == "blocks":
        kernels = replace(kernels, compiled=compile_blocks(model, device_type))
    enable_activation_checkpointing(model, train.activation_checkpointing)
    model.train()
    parts = summarise_parts(model, config.optim, parameters)
    return PreparedModel(model, source, parameters, parts, kernels)


def _check_new_rows(rows: Sequence[str], parameters: ParameterPlan) -> None:
    """Refuse learned span positions that would not change."""
    if rows and not any(name in parameters.rates for name in rows):
        raise UsageError(
            "model.span_positions=learned, and no rule trains the new rows",
            "they would not change, and spans would all look alike.",
            "train them: train.parameters=[{match: projectors.*.span_positions.*}], or use "
            "model.span_positions=fixed.",
        )


def shard_model(
    config: RunConfig, *, prepared: PreparedModel, settings: EngineSettings, session: Session
) -> tuple[Engine, list[ParameterRate]]:
    """Shard a prepared model over the ranks. All ranks call it together.

    Args:
        config: the recipe.
        prepared: the model, and what trains.
        settings: what the recipe says to the engine.
        session: what this start holds.

    Returns:
        The engine, and how each of its parameter groups trains.

    Raises:
        UsageError: frozen weights cannot be quantised as the recipe says.
    """
    model = prepared.model
    with session.timing.measure("engine"):
        if config.engine.frozen_weights != "plain":
            quantise_layers(
                model,
                config.engine.frozen_weights,
                prepared.weights,
                dtype=settings.compute_dtype,
                device=settings.device,
            )
        groups = build_parameter_groups(model, prepared.parameters.rates)
        engine_class = get_engine(config.engine.name).load()
        resident = config.engine.frozen == "resident"  # decided since the settings were made
        parts = replace(settings, parts=map_parts(model), frozen_resident=resident)
        torch_groups = [group.to_torch() for group in groups]
        engine = engine_class.wrap(model, torch_groups, parts, prepared.weights)
    session.hold(engine.close)
    return engine, [group.rate for group in groups]
