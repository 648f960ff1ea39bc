"""Putting a trainer together: every part is built in order, and handed over by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from onellm_dist.common.run_files import CHECKPOINTS, SAMPLES
from onellm_dist.config.schema import RunConfig
from onellm_dist.train import setup
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.callbacks.build import build_callbacks, load_callbacks
from onellm_dist.train.callbacks.callback_list import CallbackList
from onellm_dist.train.callbacks.preemption import Preemption
from onellm_dist.train.checkpoint.folder import read_manifest
from onellm_dist.train.checkpoint.resume import ResumeTarget, find_checkpoint
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.flops import FlopCounter
from onellm_dist.train.records.metrics import MetricSet
from onellm_dist.train.records.old_runs import check_manifest, check_run_directory
from onellm_dist.train.records.run_directory import check_inputs_stay
from onellm_dist.train.records.sample_log import SampleLog
from onellm_dist.train.session import Session
from onellm_dist.train.start_records import open_records, write_start
from onellm_dist.train.state import TrainState
from onellm_dist.train.step import StepMeter

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
    inputs, weights = setup.open_inputs(config, target=target, session=session)
    meter = _build_meter(config, inputs, dist)  # counts weights before they are sharded
    engine, router = setup.shard_model(
        config, inputs=inputs, weights=weights, settings=settings, session=session
    )
    del weights
    first_step = setup.restore_checkpoint(inputs, engine=engine, session=session)
    events = open_records(config, inputs=inputs, session=session)
    sample_log = SampleLog(config.run.dir / SAMPLES, rank=dist.rank)
    monitor = setup.build_monitor(config, inputs=inputs, sample_log=sample_log)
    checkpoints = setup.build_checkpoints(
        config, engine=engine, inputs=inputs, monitor=monitor, dist=dist, events=events
    )
    built_in: list[Callback] = [session.watchdog, preemption, session.timing]
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
    )
    session.hold(trainer.callbacks.close)
    session.hold(sample_log.close)
    trainer.begin_at(first_step)
    write_start(trainer, target)
    return trainer


def _build_meter(config: RunConfig, inputs: setup.Inputs, dist: Distributed) -> StepMeter:
    encoder_trains = config.train.encoder == "trainable"
    flops = FlopCounter(
        inputs.model, inputs.plan.corpus, config.train.stage, encoder_trains=encoder_trains
    )
    return StepMeter(MetricSet(), flops, dist)


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
