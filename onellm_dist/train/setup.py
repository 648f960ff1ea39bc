"""Builders of the parts of a run.

`assemble.py` calls them in order. Each takes its own sections of the recipe; only what checks the
recipe, or writes it into checkpoints, takes all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from onellm_dist import __version__
from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.common.run_files import CHECKPOINTS
from onellm_dist.config.schema import DataSection, RunConfig, StabilitySection
from onellm_dist.config.train_sections import EarlyStoppingSection
from onellm_dist.data.length_check import check_batch, check_corpus
from onellm_dist.data.phases import parse_data_phases
from onellm_dist.data.plan import Plan
from onellm_dist.data.token_budget import UNLIMITED, set_budget
from onellm_dist.data.validation import open_validation_plan
from onellm_dist.model.llm.positions import get_context
from onellm_dist.model.spans.trained import set_spans
from onellm_dist.model.weights.lazy import InitialWeights, open_model
from onellm_dist.train.callbacks.early_stopping import EarlyStopping
from onellm_dist.train.callbacks.preemption import grace_period_seconds, warn_about_grace_period
from onellm_dist.train.callbacks.trackers import check_trackers
from onellm_dist.train.checkpoint.folder import get_steps_done, read_manifest
from onellm_dist.train.checkpoint.reference import describe_reference
from onellm_dist.train.checkpoint.resume import ResumeTarget
from onellm_dist.train.checkpoint.source import describe_source
from onellm_dist.train.checkpoint.state import check_adapters, load_state
from onellm_dist.train.checkpoint.weights import check_weights
from onellm_dist.train.checkpoint.writer import Checkpoints
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine
from onellm_dist.train.engine.frozen_weights import check_frozen_weights
from onellm_dist.train.engine.settings import EngineSettings, make_settings
from onellm_dist.train.optim.optimizers import check_optim
from onellm_dist.train.records.events import Events
from onellm_dist.train.records.sample_log import SampleLog
from onellm_dist.train.stability.monitor import StabilityMonitor
from onellm_dist.train.start.exclusions import read_run_exclusions
from onellm_dist.train.start.frozen_placement import resolve_frozen
from onellm_dist.train.start.inputs import Inputs
from onellm_dist.train.start.pack_budget import resolve_budget
from onellm_dist.train.start.resume_changes import check_epochs_stay, check_steps_left
from onellm_dist.train.start.session import Session


def check_recipe(config: RunConfig, dist: Distributed) -> EngineSettings:
    """Refuse what can be refused without reading anything; return the settings of the engine.

    Raises:
        UsageError: the recipe names an engine, optimizer or tracker that does not exist or fit.
    """
    check_optim(config.optim, config.train.parameters, config.train.steps)
    check_trackers(config.track)
    check_frozen_weights(config.engine, config.train)
    return make_settings(config, world_size=dist.world_size, device=dist.device)


def open_inputs(
    config: RunConfig, *, target: ResumeTarget, session: Session
) -> tuple[RunConfig, Inputs, InitialWeights]:
    """Open model and data, and find token budgets that are `auto`. All ranks call it together.

    Args:
        config: the recipe.
        target: the checkpoint that is resumed.
        session: what this start holds.

    Returns:
        The recipe with what was `auto`, the inputs, and where the weights of the model come from.

    Raises:
        UsageError: the model or a dataset does not exist, or the recipe does not fit the
            checkpoint.
    """
    manifest = {} if target.folder is None else read_manifest(target.folder) or {}
    check_steps_left(config, target, manifest)
    check_epochs_stay(config, target)
    with session.timing.measure("model"):
        if config.model.path is not None:
            check_weights(config.model.path, session.dist)
        model, processor, weights = session.dist.call_together(
            lambda: open_model(
                path=config.model.path,
                preset=config.model.preset,
                seed=config.run.seed,
                span_positions=config.model.span_positions,
            )
        )
    with session.timing.measure("data"):
        plan, validation_plan = open_plans(
            config.data,
            tokenizer=processor.tokenizer,
            seed=config.run.seed,
            model=model,
            dist=session.dist,
        )
        exclusions = read_run_exclusions(config, target, session.dist)
        plans = [plan, *filter(None, [validation_plan])]
        for opened in plans:
            opened.corpus.exclusions = exclusions
        config, budget = resolve_budget(config, plans, session.dist)
        config, frozen = resolve_frozen(config, plan, session.dist)
    inputs = Inputs(
        target=target,
        manifest=manifest,
        model=model,
        processor=processor,
        plan=plan,
        validation_plan=validation_plan,
        new_phase=follow_checkpoint(plan, target.folder),
        lora=config.train.lora,
        budget=budget,
        frozen=frozen,
    )
    return config, inputs, weights


def open_plans(
    data: DataSection, *, tokenizer: Any, seed: int, model: Any, dist: Distributed
) -> tuple[Plan, Plan | None]:
    """Open the plan of the run, and that of its validation set. All ranks call it together.

    Args:
        data: the `data` section.
        tokenizer: the processor's tokenizer.
        seed: the run's seed.
        model: the model; its modalities and the sizes of its encoder count.
        dist: the ranks.

    Raises:
        UsageError: something is wrong with the mixture or the validation set, or a sample is longer
            than a micro-batch or the LLM's context.
    """
    if data.finds_budgets:
        data = set_budget(data, UNLIMITED)  # until `resolve_budget` knows them
    arguments = (data, tokenizer, seed, list(model.config.modalities))
    set_spans(model.config, data.spans)  # the saved model reads media as it was trained
    sizes = model.config.vision.patches, model.config.vision.prefix
    positions = get_context(model.config.text_config, model.llm_support)

    def check(plan: Plan) -> None:
        check_corpus(plan.corpus, positions=positions)

    def check_validation(plan: Plan) -> None:
        check_batch(plan.corpus, plan.step(0, 1).samples, positions=positions)
        check_validation_targets(plan)

    plan = _open_on_rank_zero_first(dist, partial(Plan.open, *arguments, sizes=sizes), check)
    if data.validation is None:
        return plan, None
    open_validation = partial(open_validation_plan, *arguments, sizes=sizes)
    return plan, _open_on_rank_zero_first(dist, open_validation, check_validation)


def check_validation_targets(plan: Plan) -> None:
    """Refuse a validation set whose loss would always be 0.

    Raises:
        UsageError: no sample has a supervised token.
    """
    totals = plan.step(0, 1).totals
    if not totals.supervised_tokens:
        raise UsageError(
            f"data.validation: none of its {format_count(totals.samples, 'sample')} has a "
            f"supervised token",
            "its loss would always be 0.",
            "raise data.max_text_tokens, or use another split.",
        )


def _open_on_rank_zero_first(
    dist: Distributed, open_plan: Callable[..., Plan], check: Callable[[Plan], None]
) -> Plan:
    """Rank 0 counts the tokens of shards that have no counts yet, and checks; the others wait."""
    opened: list[Plan] = []

    def open_and_check() -> None:
        opened.append(open_plan())
        check(opened[0])

    dist.ask_rank_zero(open_and_check)
    return opened[0] if opened else open_plan(build_counts=False)


def follow_checkpoint(plan: Plan, folder: Path | None) -> bool:
    """Let the plan continue the stream of a checkpoint. Every rank reads the same manifest.

    Args:
        plan: the plan.
        folder: the checkpoint; None: the stream begins at step 0.

    Returns:
        Whether a new data phase begins.

    Raises:
        UsageError: the recipe's stream is not that of the checkpoint.
    """
    if folder is None:
        return False
    manifest = read_manifest(folder) or {}
    history = parse_data_phases(manifest.get("data_phases", []), f"{folder}/manifest.json")
    return plan.follow(history, get_steps_done(manifest))


def restore_checkpoint(inputs: Inputs, *, engine: Engine, session: Session) -> int:
    """Load the checkpoint that is resumed into the engine. All ranks call it together.

    Args:
        inputs: what this start has read.
        engine: receives the state.
        session: what this start holds.

    Returns:
        The index of the first step.

    Raises:
        UsageError: the checkpoint does not fit the model.
    """
    folder = inputs.target.folder
    if folder is None:
        return 0
    check_adapters(folder, inputs.manifest, inputs.lora)
    with session.timing.measure("checkpoint"):
        return get_steps_done(load_state(folder, engine, session.dist))


def build_monitor(
    section: StabilitySection, *, data: DataSection, inputs: Inputs, sample_log: SampleLog
) -> StabilityMonitor:
    """Build what checks every step; a new data phase starts its windows anew.

    Args:
        section: `stability`.
        data: how many samples may be unreadable, and whether they are pairs.
        inputs: what this start has read.
        sample_log: says how many samples could not be read.
    """
    return StabilityMonitor(
        section,
        max_skipped_samples=data.max_skipped_samples,
        skipped_samples=sample_log.unreadable,
        state={} if inputs.new_phase else inputs.manifest.get("stability", {}),
        pairs=data.preference_pairs,
    )


def build_early_stopping(
    section: EarlyStoppingSection | None, *, run_dir: Path, inputs: Inputs, dist: Distributed
) -> EarlyStopping:
    """Build what knows whether the validation loss has stopped falling.

    Args:
        section: `train.early_stopping`.
        run_dir: `run.dir`.
        inputs: what this start has read.
        dist: the ranks.
    """
    plan = inputs.validation_plan
    return EarlyStopping(
        section,
        run_dir=run_dir,
        dist=dist,
        sample_digest=plan.digest(0) if plan is not None and dist.is_rank_zero else "",
    )


def build_checkpoints(
    config: RunConfig,
    *,
    engine: Engine,
    inputs: Inputs,
    monitor: StabilityMonitor,
    dist: Distributed,
    events: Events,
) -> Checkpoints:
    """Build what writes the checkpoints of the run.

    Args:
        config: the recipe.
        engine: holds the state.
        inputs: what this start has read; the data phases go into every checkpoint.
        monitor: its state goes into every checkpoint.
        dist: the ranks.
        events: where checkpoints are recorded.
    """
    plan, lora = inputs.plan, config.train.lora

    def make_manifest(steps_done: int) -> dict[str, Any]:
        return {
            "stage": config.train.stage,
            "plan": plan.fingerprint(),
            "onellm_dist": __version__,
            "model": config.model.model_dump(mode="json"),
            "spans": config.data.spans,
            "seed": config.run.seed,
            "data_phases": [data_phase.to_json() for data_phase in plan.data_phases],
            "stability": monitor.state(),
            **({"lora": lora.model_dump(mode="json")} if lora is not None else {}),
            **describe_reference(config),
        }

    grace_period = grace_period_seconds()

    def write_event(event: str, *, steps_done: int, seconds: float, **fields: Any) -> None:
        events.write(event, steps_done=steps_done, seconds=seconds, **fields)
        warn_about_grace_period(events, grace_period, steps_done=steps_done, seconds=seconds)

    return Checkpoints(
        config.run.dir / CHECKPOINTS,
        engine,
        dist,
        config.checkpoint,
        make_manifest,
        partial(describe_source, config, inputs.manifest.get("frozen")),
        write_event,
    )
