"""What a start records: the run directory becomes its own, and its events say what it resumes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from onellm_dist import __version__
from onellm_dist.common.counts import format_count
from onellm_dist.common.run_files import CHECKPOINTS, SAMPLES
from onellm_dist.common.secrets import mask_text
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.epochs import describe_length
from onellm_dist.data.phases import DataPhase
from onellm_dist.model.model_kernels import KernelChoice
from onellm_dist.train.callbacks.preemption import grace_period_seconds
from onellm_dist.train.checkpoint.folder import get_steps_done, recover_checkpoints
from onellm_dist.train.checkpoint.inherit import apply_resume
from onellm_dist.train.checkpoint.resume import ResumeTarget
from onellm_dist.train.distributed import name_device
from onellm_dist.train.optim.part_summary import PartSummary, format_parts, to_json
from onellm_dist.train.optim.rules import ParameterRate
from onellm_dist.train.records.data_phases import write_data_phases
from onellm_dist.train.records.events import Events
from onellm_dist.train.records.run_directory import prepare_directory
from onellm_dist.train.start.exclusions import write_exclusions
from onellm_dist.train.start.inputs import Inputs
from onellm_dist.train.start.kernel_record import record_kernels
from onellm_dist.train.start.pack_budget import write_budget
from onellm_dist.train.start.resume_changes import (
    TrainedParameters,
    find_resume_changes,
    write_changes,
)
from onellm_dist.train.start.session import Session

if TYPE_CHECKING:
    from onellm_dist.train.trainer import Trainer


def open_records(
    config: RunConfig,
    *,
    inputs: Inputs,
    rates: Mapping[str, ParameterRate],
    session: Session,
) -> Events:
    """Make the run directory that of this start, and open its events. All ranks call it together.

    Everything that can be refused has been checked before: nothing is written until here.

    Args:
        config: the recipe.
        inputs: what this start has read.
        rates: how each parameter trains.
        session: its exit file and heartbeat learn about events and samples.
    """
    run_dir, dist, plan = config.run.dir, session.dist, inputs.plan
    changes, earlier = dist.ask_rank_zero(
        lambda: find_resume_changes(config, inputs.target, frozen_decided=inputs.frozen is not None)
    )

    def prepare() -> None:
        recover_checkpoints(run_dir / CHECKPOINTS)
        prepare_directory(config, inputs.target.folder, get_steps_done(inputs.manifest))
        apply_resume(config, inputs.target)
        datasets = {d.name: mask_text(_to_absolute(d.location)) for d in plan.corpus.datasets}
        write_data_phases(run_dir / SAMPLES, plan.data_phases, datasets)

    session.begin(prepare)
    events = Events(run_dir, enabled=dist.is_rank_zero)
    session.exit_file.on_failure = partial(write_failed_end, run_dir)
    session.heartbeat.sample_names = lambda micro: plan.corpus.sample_ids(micro.samples)
    session.heartbeat.spans = plan.corpus.spans
    session.heartbeat.loader_workers = config.data.workers
    write_damaged_checkpoints(events, inputs.target)
    write_budget(
        run_dir,
        events,
        inputs.budget,
        is_rank_zero=dist.is_rank_zero,
        fresh=inputs.target.folder is None,
    )
    trained = TrainedParameters(inputs.model, inputs.modalities, rates)
    write_changes(events, config, changes, earlier, get_steps_done(inputs.manifest), trained)
    if dist.is_rank_zero:
        write_exclusions(events, plan, inputs.validation_plan)
    if inputs.plan_changed:
        write_plan_changed(events, inputs.target, get_steps_done(inputs.manifest))
    if inputs.new_phase:
        write_data_phase(events, plan.data_phases[-1], len(plan.data_phases))
    return events


def _to_absolute(location: str) -> str:
    return location if "://" in location else str(Path(location).resolve())


def write_start(
    trainer: Trainer, inputs: Inputs, parts: Sequence[PartSummary], kernels: KernelChoice
) -> None:
    """Write the event `start`.

    Args:
        trainer: the trainer, which has begun at its first step.
        inputs: what this start has read.
        parts: what trains, part by part of the model.
        kernels: what the model runs beside attention.
    """
    if not trainer.dist.is_rank_zero:
        return
    state, dist, config = trainer.state, trainer.dist, trainer.config
    trainable = sum(part.trained for part in parts)
    table = "\n".join(f"  {line}" for line in format_parts(parts))
    mfu = trainer.meter.describe_mfu()
    datasets = trainer.plan.corpus.datasets
    length = describe_length(config.data, datasets, config.train.steps)
    folder, frozen = inputs.target.folder, inputs.frozen
    placement = f"\nfrozen weights are {frozen.frozen}: {frozen.reason}" if frozen else ""
    origin = f"resumes {folder.name} (step {state.first_step})" if folder else "starts at step 0"
    trainer.events.write(
        "start",
        world_size=dist.world_size,
        device=str(dist.device),
        device_name=name_device(dist.device),
        first_step=state.first_step,
        resumed=str(folder) if folder else None,
        lost_steps=state.lost_steps,
        lost_seconds=round(state.lost_seconds, 3),
        mfu=mfu,
        trainable=trainable,
        parameters=to_json(parts),
        length=length,
        frozen=frozen.frozen if frozen else config.engine.frozen,
        frozen_reason=frozen.reason if frozen else None,
        kernels=record_kernels(trainer.model, kernels, dist.device, trainer.engine.compute_dtype),
        threads=torch.get_num_threads(),
        onellm_dist=__version__,
        nodes=dist.world_size // dist.local_world_size,
        grace_period_seconds=grace_period_seconds(),
        **describe_slurm_job(os.environ),
        message=f"{config.train.stage}: {trainable:,} trainable parameters, "
        f"{format_count(dist.world_size, 'rank')} on {dist.device.type}, {origin} of "
        f"{config.train.steps}\n{length}\n{table}\n{mfu}"
        f"{placement}",
    )


def describe_slurm_job(env: Mapping[str, str]) -> dict[str, Any]:
    """What Slurm says about the job of this start; nothing outside of one."""
    if "SLURM_JOB_ID" not in env:
        return {}
    nodes = env.get("SLURM_JOB_NUM_NODES") or env.get("SLURM_NNODES")
    return {
        "slurm_job_id": env["SLURM_JOB_ID"],
        "slurm_restart_count": int(env.get("SLURM_RESTART_COUNT") or 0),
        "slurm_nodes": int(nodes) if nodes else None,
        "slurm_node_list": env.get("SLURM_JOB_NODELIST"),
    }


def write_damaged_checkpoints(events: Events, target: ResumeTarget) -> None:
    """Write an event for each newer checkpoint that is damaged."""
    for name, problem in target.damaged:
        events.write(
            "checkpoint_damaged",
            folder=name,
            problems=[problem],
            resumed=target.folder.name if target.folder else None,
            message=f"checkpoint {name} is damaged and passed over: {problem}",
            warning=True,
        )


def write_plan_changed(events: Events, target: ResumeTarget, steps_done: int) -> None:
    """Write the event of a checkpoint without data phases that was written with other data."""
    assert target.folder is not None
    events.write(
        "plan_changed",
        step=steps_done,
        checkpoint=target.folder.name,
        message=f"mixture, shards, seed or batch are not those of {target.folder}: other samples "
        f"come from step {steps_done} on",
        warning=True,
    )


def write_data_phase(events: Events, data_phase: DataPhase, number: int) -> None:
    """Write the event of a data phase that begins.

    Args:
        events: where it goes.
        data_phase: the data phase.
        number: its number in the run; the first is 1.
    """
    total = sum(data_phase.counts.values())
    shares = ", ".join(f"{name} {count / total:.4f}" for name, count in data_phase.counts.items())
    events.write(
        "data_phase",
        step=data_phase.start,
        counts=dict(data_phase.counts),
        global_batch=data_phase.global_batch,
        message=f"data phase {number} begins at step {data_phase.start}: {shares}",
    )


def write_failed_end(run_dir: Path, found: Mapping[str, Any]) -> None:
    """Write the event `end` of a start that failed, on the rank that failed first.

    Args:
        run_dir: the run directory.
        found: what `exit.json` says.
    """
    fields = {key: value for key, value in found.items() if key != "time"}
    Events(run_dir, enabled=True, repair=False).write("end", **fields)
