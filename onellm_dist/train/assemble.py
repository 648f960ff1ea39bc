"""Putting a trainer together: every part is built in order, and handed over by name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from onellm_dist.common.run_files import CHECKPOINTS, SAMPLES
from onellm_dist.config.schema import RunConfig
from onellm_dist.model.model_kernels import KernelChoice
from onellm_dist.model.weights.lazy import InitialWeights
from onellm_dist.train import setup
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.callbacks.build import build_callbacks, load_callbacks
from onellm_dist.train.callbacks.callback_list import CallbackList
from onellm_dist.train.callbacks.early_stopping import EarlyStopping
from onellm_dist.train.callbacks.experts import RouterWatch
from onellm_dist.train.callbacks.preemption import Preemption
from onellm_dist.train.checkpoint.folder import read_manifest
from onellm_dist.train.checkpoint.resume import ResumeTarget, find_checkpoint
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.optim.part_summary import PartSummary
from onellm_dist.train.records.metrics import MetricSet
from onellm_dist.train.records.old_runs import check_manifest, check_run_directory
from onellm_dist.train.records.run_directory import check_inputs_stay
from onellm_dist.train.records.sample_log import SampleLog
from onellm_dist.train.stability.monitor import StabilityMonitor
from onellm_dist.train.start.inputs import Inputs
from onellm_dist.train.start.model import PreparedModel, prepare_model, shard_model
from onellm_dist.train.start.records import open_records, write_start
from onellm_dist.train.start.session import Session
from onellm_dist.train.state import TrainState
from onellm_dist.train.step.flops import FlopCounter
from onellm_dist.train.step.values import StepMeter

if TYPE_CHECKING:
    from onellm_dist.train.trainer import Trainer


def assemble_trainer(
    trainer_class: type[Trainer],
    config: RunConfig,
    *,
    session: Session,
    callbacks: Sequence[Callback],
) -> Trainer:
    """Build every part of a run, and the trainer of them. All ranks call it together.

    Args:
        trainer_class: the class of the trainer.
        config: the recipe.
        session: what this start holds.
        callbacks: callbacks beside those of the recipe.

    Raises:
        UsageError: the recipe asks for something that does not exist or is not possible.
    """
    dist = session.dist
    settings = setup.check_recipe(config, dist)
    callbacks = [*load_callbacks(config.train.callbacks), *callbacks]
    target, preemption = _find_target(config, session)
    config, inputs, weights = setup.open_inputs(config, target=target, session=session)
    prepared = _prepare(config, inputs, weights, dist)
    meter = StepMeter(MetricSet(), FlopCounter(inputs.model, inputs.plan.corpus), dist)  # unsharded
    router = RouterWatch(inputs.model, inputs.modalities)
    engine, rates = shard_model(config, prepared=prepared, settings=settings, session=session)
    parts, kernels, by_name = prepared.parts, prepared.kernels, prepared.parameters.rates
    del weights, prepared
    first_step = setup.restore_checkpoint(inputs, engine=engine, session=session)
    events = open_records(config, inputs=inputs, rates=by_name, session=session)
    sample_log = SampleLog(config.run.dir / SAMPLES, rank=dist.rank)
    monitor, early_stopping = _build_checks(config, inputs, sample_log=sample_log, dist=dist)
    checkpoints = setup.build_checkpoints(
        config, engine=engine, inputs=inputs, monitor=monitor, dist=dist, events=events
    )
    built_in: list[Callback] = [session.watchdog, preemption, session.timing, early_stopping]
    built_in += build_callbacks(
        config, inputs=inputs, engine=engine, router=router, dist=dist, events=events
    )
    trainer = trainer_class(
        config=config,
        session=session,
        plan=inputs.plan,
        engine=engine,
        model=inputs.model,
        processor=inputs.processor,
        state=TrainState(),
        monitor=monitor,
        sample_log=sample_log,
        checkpoints=checkpoints,
        events=events,
        callbacks=CallbackList([*built_in, *callbacks]),
        preemption=preemption,
        meter=meter,
        rates=rates,
        early_stopping=early_stopping,
    )
    return _begin(trainer, first_step, inputs, parts, kernels)


def _build_checks(
    config: RunConfig, inputs: Inputs, *, sample_log: SampleLog, dist: Distributed
) -> tuple[StabilityMonitor, EarlyStopping]:
    """Build what watches the steps, and what watches the validations."""
    monitor = setup.build_monitor(
        config.stability, data=config.data, inputs=inputs, sample_log=sample_log
    )
    stopping = setup.build_early_stopping(
        config.train.early_stopping, run_dir=config.run.dir, inputs=inputs, dist=dist
    )
    return monitor, stopping


def _prepare(
    config: RunConfig, inputs: Inputs, weights: InitialWeights, dist: Distributed
) -> PreparedModel:
    """Prepare the model on every rank, or fail on all: one node may lack what compiles."""
    prepare = partial(prepare_model, config, inputs=inputs, weights=weights)
    return dist.call_together(partial(prepare, device_type=dist.device.type))


def _begin(
    trainer: Trainer,
    first_step: int,
    inputs: Inputs,
    parts: Sequence[PartSummary],
    kernels: KernelChoice,
) -> Trainer:
    """Let a trainer begin at its first step, and record that."""
    trainer.session.hold(trainer.callbacks.close)
    trainer.session.hold(trainer.sample_log.close)
    trainer.budget = inputs.budget
    trainer.begin_at(first_step)
    write_start(trainer, inputs, parts, kernels)
    return trainer


def _find_target(config: RunConfig, session: Session) -> tuple[ResumeTarget, Preemption]:
    """Lock the run directory, find what to resume, and begin to listen for requests to stop."""
    run_dir = config.run.dir
    session.lock()
    check_run_directory(run_dir)
    with session.timing.measure("checkpoint"):
        target = find_checkpoint(config, run_dir / CHECKPOINTS, session.dist)
    check_inputs_stay(config, target.folder)
    if target.folder is not None:
        check_manifest(target.folder, read_manifest(target.folder) or {})
    return target, session.listen()
