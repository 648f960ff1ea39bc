"""The events of a start: what it resumes, on how many ranks, in which job; and how it failed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from onellm_dist import __version__
from onellm_dist.data.phases import DataPhase
from onellm_dist.train.callbacks.preemption import grace_period_seconds
from onellm_dist.train.checkpoint.resume import ResumeTarget
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.records.events import Events
from onellm_dist.train.state import TrainState


def write_start(
    events: Events,
    *,
    state: TrainState,
    dist: Distributed,
    target: ResumeTarget,
    stage: str,
    steps: int,
    trainable: int,
    mfu: str,
) -> None:
    """Write the event `start`.

    Args:
        events: where it goes.
        state: the progress of the run.
        dist: the ranks.
        target: what this start resumes.
        stage: `train.stage`.
        steps: `train.steps`.
        trainable: number of trainable parameters.
        mfu: the formula of the MFU.
    """
    folder = target.folder
    origin = f"resumes {folder.name} (step {state.first_step})" if folder else "starts at step 0"
    events.write(
        "start",
        world_size=dist.world_size,
        device=str(dist.device),
        first_step=state.first_step,
        resumed=str(folder) if folder else None,
        lost_steps=state.lost_steps,
        lost_seconds=round(state.lost_seconds, 3),
        mfu=mfu,
        trainable=trainable,
        threads=torch.get_num_threads(),
        onellm_dist=__version__,
        nodes=dist.world_size // dist.local_world_size,
        grace_period_seconds=grace_period_seconds(),
        **describe_slurm_job(os.environ),
        message=f"{stage}: {trainable:,} trainable parameters, {dist.world_size} ranks on "
        f"{dist.device.type}, {origin} of {steps}\n{mfu}",
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
