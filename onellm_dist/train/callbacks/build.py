"""The callbacks of a run: those of the package, and those that the recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from onellm_dist.common.errors import UsageError
from onellm_dist.common.plugins import CALLBACKS, import_class, load_plugins
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.plan import Plan
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.callbacks.best_model import BestModel
from onellm_dist.train.callbacks.experts import Experts, RouterWatch
from onellm_dist.train.callbacks.metrics import MetricsWriter
from onellm_dist.train.callbacks.profiler import Profiler
from onellm_dist.train.callbacks.sample_generation import SampleGeneration
from onellm_dist.train.callbacks.stragglers import Stragglers
from onellm_dist.train.callbacks.telemetry import Telemetry
from onellm_dist.train.callbacks.trackers import Trackers
from onellm_dist.train.callbacks.validation import Validation
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine
from onellm_dist.train.records.events import Events


def load_callbacks(names: Sequence[str]) -> list[Callback]:
    """Make the callbacks that a recipe names in `train.callbacks`.

    Args:
        names: `module:Class` each, or the name of an entry point of the group
            `onellm_dist.callbacks`.

    Raises:
        UsageError: a name cannot be imported, is not known, or is not a Callback.
    """
    return [_load_class(name)() for name in names]


def _load_class(name: str) -> Any:
    why = "the run would go without it."
    if ":" in name:
        return import_class(name, Callback, key="train.callbacks", why=why)
    known = load_plugins(CALLBACKS)
    if name not in known:
        raise UsageError(
            f"train.callbacks: {name} is not a callback of an installed package",
            why,
            f"use module:Class, or one of: {', '.join(known) or 'none is installed'}.",
        )
    if not (isinstance(known[name], type) and issubclass(known[name], Callback)):
        raise UsageError(
            f"train.callbacks: {name} is not a subclass of onellm_dist.Callback",
            "it does not have the hooks that are called.",
            "derive it from Callback.",
        )
    return known[name]


class RunInputs(Protocol):
    """What the callbacks need of what a start has read (`start.inputs.Inputs`)."""

    @property
    def model(self) -> Any:
        """The model inside the engine."""

    @property
    def processor(self) -> Any:
        """The processor of the model."""

    @property
    def validation_plan(self) -> Plan | None:
        """The plan of the validation set; None where there is none."""


def build_callbacks(
    config: RunConfig,
    *,
    inputs: RunInputs,
    engine: Engine,
    router: RouterWatch,
    dist: Distributed,
    events: Events,
) -> list[Callback]:
    """Make the callbacks that every run has.

    Args:
        config: the recipe.
        inputs: what this start has read.
        engine: the engine.
        router: gives the router load.
        dist: the ranks.
        events: where callbacks record events.
    """
    train, track, run_dir = config.train, config.track, config.run.dir
    rank_zero = dist.is_rank_zero
    log = {"log_every": train.log_every, "steps": train.steps}
    recipe = config.model_dump(mode="json", by_alias=True)
    return [
        Telemetry(dist.device, **log),
        Stragglers(dist, events),
        Experts(router, track=track, events=events, **log),
        MetricsWriter(run_dir, enabled=rank_zero, **log),
        Trackers(track, run_dir, recipe, events, enabled=rank_zero),
        Profiler(track, run_dir, dist.device, events, enabled=rank_zero),
        *build_validation(config, inputs=inputs, engine=engine, dist=dist),
    ]


def build_validation(
    config: RunConfig, *, inputs: RunInputs, engine: Engine, dist: Distributed
) -> list[Callback]:
    """Make the callbacks around validation; [] where the recipe has none.

    Args:
        config: the recipe.
        inputs: what this start has read.
        engine: the engine.
        dist: the ranks.
    """
    section, plan, run_dir = config.data.validation, inputs.validation_plan, config.run.dir
    if section is None or plan is None:
        return []
    validation = Validation(
        section,
        plan=plan,
        engine=engine,
        model=inputs.model,
        dist=dist,
        run_dir=run_dir,
        steps=config.train.steps,
    )
    generation = SampleGeneration(
        section,
        plan=plan,
        engine=engine,
        tokenizer=inputs.processor.tokenizer,
        dist=dist,
        run_dir=run_dir,
    )
    best = BestModel(
        run_dir,
        engine=engine,
        model=inputs.model,
        processor=inputs.processor,
        dist=dist,
        sample_digest=plan.digest(0) if dist.is_rank_zero else "",
    )
    return [validation, *([generation] if section.generate else []), best]
