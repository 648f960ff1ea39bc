"""Run directories as training and the job script write them, on a clock that the test sets."""

from __future__ import annotations

import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from onellm_dist.common import run_files
from onellm_dist.report.facts import RunFacts, load_facts
from onellm_dist.train.records.json_lines import drop_lines_from
from onellm_dist.train.records.metrics import MetricSet

STARTUP_SECONDS = {
    "imports": 20.0,
    "process_group": 3.0,
    "model": 40.0,
    "engine": 15.0,
    "checkpoint": 8.0,
    "data": 4.0,
}
OPTIM = {"lr": 5e-5, "warmup_steps": 20, "grad_clip": 2.0}


class RecordedRun:
    """A run whose history the test writes; `clock` is in seconds since 1970."""

    def __init__(
        self,
        directory: Path,
        *,
        steps: int = 200,
        every: int = 50,
        step_seconds: float = 2.0,
        slurm: bool = True,
        seed: int = 0,
    ) -> None:
        self.directory = directory
        self.steps = steps
        self.step_seconds = step_seconds
        self.slurm = slurm
        self.clock = 1_760_000_000.0
        self.random = random.Random(seed)
        self.attempt: dict[str, Any] = {}
        self.restarts = -1
        self.step = 0
        self.world_size = 0
        self._startup: dict[str, float] = {}
        directory.mkdir(parents=True)
        (directory / run_files.LOCK).touch()
        config = {
            "run": {"dir": str(directory), "seed": 0},
            "model": {"preset": "toy"},
            "data": {"global_batch": 32, "max_skipped_samples": 10},
            "train": {"stage": "align", "steps": steps, "precision": "bf16"},
            "optim": OPTIM,
            "engine": {"name": "deepspeed", "config": "zero3"},
            "checkpoint": {"every": every, "keep": 2},
        }
        (directory / run_files.CONFIG).write_text(yaml.safe_dump(config))

    def allocate(
        self,
        *,
        nodes: tuple[str, ...] = ("gpu01", "gpu02"),
        ranks_per_node: int = 8,
        queue: float = 0.0,
    ) -> None:
        """Slurm allocates nodes, and the job script records it."""
        self.clock += queue
        self.restarts += 1
        self.world_size = len(nodes) * ranks_per_node
        (self.directory / run_files.EXIT).unlink(missing_ok=True)
        self.attempt = {
            "job_id": "1234",
            "restart_count": self.restarts,
            "nodes": list(nodes),
            "start": self.format_clock(),
            "end": None,
            "status": "running",
            "steps_done": None,
            "failed_step": None,
            "reason": "",
            "offending_samples": [],
            "checkpoint": None,
            "action": "",
            "delay_s": 0,
        }
        self._write_attempt()

    def start(
        self, first_step: int, *, job: float = 5.0, timed: bool = True, **seconds: float
    ) -> None:
        """The ranks come up; `timed`: they record their start-up timing and lost steps."""
        startup = {**STARTUP_SECONDS, **seconds} if timed else {}
        self.clock += job + sum(startup.values())
        dropped = drop_lines_from(self.directory / run_files.METRICS, first_step)
        extra: dict[str, Any] = {}
        if timed:
            extra = {
                "lost_steps": len(dropped),
                "lost_seconds": sum(line["seconds"] for line in dropped),
                "nodes": len(self.attempt["nodes"]),
            }
            if self.slurm:
                extra |= {
                    "slurm_job_id": "1234",
                    "slurm_restart_count": self.restarts,
                    "slurm_node_list": ",".join(self.attempt["nodes"]),
                }
        self.write_event(
            "start",
            world_size=self.world_size,
            device="cuda:0",
            first_step=first_step,
            resumed=f"checkpoints/step-{first_step:08d}" if first_step else None,
            trainable=1000,
            threads=8,
            **extra,
        )
        self.step = first_step
        self._startup = startup

    def train(self, count: int, *, every: int = 50, save: float = 3.0, **fields: Any) -> None:
        """Steps, with a checkpoint where one is due; `fields` replace those of every line."""
        for _ in range(count):
            self.train_step(**fields)
            if self.step % every == 0 or self.step == self.steps:
                self.checkpoint(save)

    def train_step(
        self, *, seconds: float | None = None, data_wait_fraction: float = 0.03, **fields: Any
    ) -> None:
        """One step; `fields` replace those of its line."""
        x = self.step
        took = self.step_seconds * self.random.uniform(0.97, 1.03) if seconds is None else seconds
        loss = 2.0 + 6.0 * math.exp(-x / 60) + self.random.gauss(0, 0.08)
        line = MetricSet().build_line(
            {
                "step": x,
                "loss": loss,
                "loss_by_modality": {"image": loss - 0.1, "video": loss + 0.3, "audio": loss + 0.1},
                "lr": 5e-5 * min(1, (x + 1) / 20),
                "grad_norm": 0.8 + abs(self.random.gauss(0, 0.1)),
                "applied": True,
                "samples": 5120,
                "global_valid_tokens": 100_000,
                "tokens": 300_000,
                "padding_fraction": 0.001,
                "tokens_per_second": 300_000 / took,
                "data_wait_fraction": data_wait_fraction,
                "mfu": 0.41 * self.step_seconds / took,
                "sample_digest": "0" * 64,
                "seconds": took,
                "pack_balance": 1.0,
                "grad_norm_by_part": {},
                "checkpoint_stall_seconds": 0.0,
            }
        )
        self._append(run_files.METRICS, {**line, **fields})
        self.clock += took
        if self._startup:
            waited = took * data_wait_fraction
            self._startup["data"] += waited
            for name, value in {**self._startup, "first_step": took - waited}.items():
                self.write_event("startup_timing", name=name, seconds=round(value, 3))
            self._startup = {}
        self.step += 1

    def checkpoint(self, seconds: float) -> None:
        """A checkpoint after the step that was the last."""
        self.clock += seconds
        self.write_event(
            "checkpoint", steps_done=self.step, folder=f"step-{self.step:08d}", seconds=seconds
        )

    def validate(self, loss: float, seconds: float = 10.0) -> None:
        """A line of `validation.jsonl` and its event."""
        self.clock += seconds
        self._append(
            run_files.VALIDATION,
            {
                "steps_done": self.step,
                "loss": loss,
                "loss_by_modality": {"image": loss},
                "samples": 64,
                "seconds": seconds,
            },
        )
        self.write_event("validation", steps_done=self.step, loss=loss)

    def end(self, status: str, reason: str, **more: Any) -> None:
        """The ranks end in good order, or record why they failed; the job script notes it."""
        code = {"done": 0, "failed": 1, "usage": 2, "preempted": 75}[status]
        end = {
            "status": status,
            "exit_code": code,
            "steps_done": self.step,
            "reason": reason,
            "rank": 0,
            **more,
        }
        self.write_event("end", **end)
        text = json.dumps({**end, "time": self.format_clock()})
        (self.directory / run_files.EXIT).write_text(text)
        self.clock += 2
        self.attempt |= {
            "end": self.format_clock(),
            "status": status,
            "steps_done": self.step,
            "reason": reason,
            **{k: v for k, v in more.items() if k in self.attempt},
        }
        self._write_attempt()

    def lose_node(self, after: float = 30.0) -> None:
        """The node dies: nothing is written until the job script begins again."""
        self.clock += after
        self.attempt |= {"status": "lost", "steps_done": self.step}
        self._write_attempt()

    def write_event(self, name: str, /, **fields: Any) -> None:
        """A line of `events.jsonl`."""
        self._append(run_files.EVENTS, {"time": self.format_clock(), "event": name, **fields})

    def skip_sample(self, sample: str, reason: str) -> None:
        """A sample that could not be read."""
        (self.directory / run_files.SAMPLES).mkdir(exist_ok=True)
        self._append(
            f"{run_files.SAMPLES}/skipped-rank00003.jsonl",
            {"step": self.step, "sample_id": sample, "reason": reason},
        )

    def format_clock(self) -> str:
        """The clock as files write it."""
        return time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(self.clock))

    def set_file_times(self) -> float:
        """Set the files' times to the clock, as they would have been; returns the clock."""
        for name in (run_files.METRICS, run_files.EVENTS):
            if (self.directory / name).exists():
                os.utime(self.directory / name, (self.clock, self.clock))
        return self.clock

    def _write_attempt(self) -> None:
        if self.slurm:
            self._append(run_files.ATTEMPTS, self.attempt)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.directory / name).open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def record_eventful_run(directory: Path) -> RecordedRun:
    """1,000 steps in four starts: preempted, a lost node with lost steps, a failure, and done."""
    run = RecordedRun(directory, steps=1000, every=100)
    _record_preempted_start(run)
    _record_lost_start(run)
    _record_failed_start(run)
    run.allocate(nodes=("gpu02", "gpu03"), queue=60.0)
    run.start(600)
    run.train(100, every=100)
    run.checkpoint(22.0)
    run.validate(2.15)
    run.train(300, every=100)
    run.end("done", "1000 steps")
    return run


def _record_preempted_start(run: RecordedRun) -> None:
    run.allocate()
    run.start(0, checkpoint=0.0)
    run.train(150, every=100)
    run.validate(3.0)
    run.skip_sample("laion/00017.tar/000170042@0", "JPEG: cut short")
    run.write_event("skipped_samples", step=150, count=1, total=1)
    run.train(180, every=100)
    run.checkpoint(4.0)
    run.end("preempted", "the file stop")


def _record_lost_start(run: RecordedRun) -> None:
    run.allocate(queue=900.0)
    run.start(330)
    run.train(40, every=100)
    for _ in range(3):
        run.train_step(seconds=14.0, data_wait_fraction=0.9)
    run.train(110, every=100)
    run.validate(2.4)
    run.train(70, every=100)
    run.lose_node()


def _record_failed_start(run: RecordedRun) -> None:
    run.allocate(nodes=("gpu02",), queue=200.0)
    run.start(500, checkpoint=30.0)
    run.train(60, every=100)
    run.train_step(grad_norm=None, applied=False, loss=None)
    sample = {
        "rank": 3,
        "micro_batch": 0,
        "sample": "laion/00017.tar/1@0",
        "modality": "image",
        "nll": None,
    }
    run.write_event(
        "step_skipped",
        step=560,
        reason="the loss is not finite",
        anomaly="loss_not_finite",
        offending_samples_total=1,
        micro_batches=[{"rank": 3, "micro_batch": 0, "samples": ["laion/00017.tar/1@0"]}],
        offending_samples=[sample],
    )
    run.train(60, every=100)
    run.train_step(grad_norm=48.0)
    run.end(
        "failed",
        "CUDA error: an illegal memory access was encountered",
        failed_step=622,
        offending_samples=["laion/00031.tar/000310099@0"],
    )


def load_eventful_run(tmp_path_factory: pytest.TempPathFactory) -> RunFacts:
    """The eventful run, recorded and loaded, for a fixture of tests that only read it."""
    run = record_eventful_run(tmp_path_factory.mktemp("recorded") / "run")
    return load_facts(run.directory, now=run.set_file_times())
