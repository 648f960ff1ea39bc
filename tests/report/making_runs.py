"""Run directories as training and the job script write them, on a clock that the test sets."""

from __future__ import annotations

import json
import math
import os
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from onellm_dist.train.records.metrics import StepReport, drop_from

PHASES = {
    "imports": 20.0,
    "process_group": 3.0,
    "model": 40.0,
    "engine": 15.0,
    "checkpoint": 8.0,
    "data": 4.0,
}
PARAMETERS = {"lr": 5e-5, "warmup_steps": 20, "grad_clip": 2.0}


class MadeRun:
    """A run that is told what happens to it; `clock` is in seconds since 1970."""

    def __init__(
        self,
        directory: Path,
        *,
        steps: int = 200,
        every: int = 50,
        step_seconds: float = 2.0,
        slurm: bool = True,
        seed: int = 0,
    ):
        self.directory, self.steps, self.step_seconds, self.slurm = (
            directory,
            steps,
            step_seconds,
            slurm,
        )
        self.clock, self.draw = 1_760_000_000.0, random.Random(seed)
        self.attempt: dict[str, Any] = {}
        self.restarts, self.step, self.world = -1, 0, 0
        directory.mkdir(parents=True)
        (directory / ".lock").touch()
        (directory / "config.yaml").write_text(
            yaml.safe_dump(
                {
                    "run": {"dir": str(directory), "seed": 0},
                    "model": {"preset": "toy"},
                    "data": {"global_batch": 32, "max_skipped_samples": 10},
                    "train": {"stage": "align", "steps": steps, "precision": "bf16"},
                    "optim": PARAMETERS,
                    "engine": {"name": "deepspeed", "config": "zero3"},
                    "checkpoint": {"every": every, "keep": 2},
                }
            )
        )

    def begin(
        self,
        *,
        nodes: tuple[str, ...] = ("gpu01", "gpu02"),
        ranks_a_node: int = 8,
        queue: float = 0.0,
    ) -> None:
        """Slurm gives nodes, and the job script records it."""
        self.clock += queue
        self.restarts += 1
        self.world = len(nodes) * ranks_a_node
        (self.directory / "exit.json").unlink(missing_ok=True)
        self.attempt = {
            "job_id": "1234",
            "restart_count": self.restarts,
            "nodes": list(nodes),
            "start": self.text(),
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
        self._row()

    def start(
        self, first_step: int, *, job: float = 5.0, told: bool = True, **phases: float
    ) -> None:
        """The ranks come up; `told` false is a version that says neither phases nor lost steps."""
        seconds = {**PHASES, **phases} if told else {}
        self.clock += job + sum(seconds.values())
        dropped = drop_from(self.directory / "metrics.jsonl", first_step)
        extra: dict[str, Any] = {}
        if told:
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
        resumed = f"checkpoints/step-{first_step:08d}" if first_step else None
        self.event(
            "start",
            world=self.world,
            device="cuda:0",
            first_step=first_step,
            resumed=resumed,
            trainable=1000,
            threads=8,
            **extra,
        )
        self.step, self._untold = first_step, seconds

    def train(self, count: int, *, every: int = 50, save: float = 3.0, **fields: Any) -> None:
        """Steps, with a checkpoint where one is due; `fields` replace those of every line."""
        for _ in range(count):
            self.one(**fields)
            if self.step % every == 0 or self.step == self.steps:
                self.checkpoint(save)

    def one(
        self, *, seconds: float | None = None, data_wait_fraction: float = 0.03, **fields: Any
    ) -> None:
        """One step."""
        x = self.step
        took = self.step_seconds * self.draw.uniform(0.97, 1.03) if seconds is None else seconds
        loss = 2.0 + 6.0 * math.exp(-x / 60) + self.draw.gauss(0, 0.08)
        line = asdict(
            StepReport(
                step=x,
                loss=loss,
                loss_by_modality={"image": loss - 0.1, "video": loss + 0.3, "audio": loss + 0.1},
                lr=5e-5 * min(1, (x + 1) / 20),
                grad_norm=0.8 + abs(self.draw.gauss(0, 0.1)),
                applied=True,
                samples=5120,
                supervised_tokens=100_000,
                tokens=300_000,
                padding_fraction=0.001,
                tokens_per_second=300_000 / took,
                data_wait_fraction=data_wait_fraction,
                mfu=0.41 * self.step_seconds / took,
                sample_digest="0" * 64,
                seconds=took,
            )
        )
        self._append("metrics.jsonl", {**line, **fields})
        self.clock += took
        if self._untold:
            waited = took * data_wait_fraction
            self._untold["data"] += waited
            for name, value in {**self._untold, "first_step": took - waited}.items():
                self.event("phase", name=name, seconds=round(value, 3))
            self._untold = {}
        self.step += 1

    def checkpoint(self, seconds: float) -> None:
        """Written after the step that was the last."""
        self.clock += seconds
        self.event("checkpoint", step=self.step, folder=f"step-{self.step:08d}", seconds=seconds)

    def validate(self, loss: float, seconds: float = 10.0) -> None:
        """A line of `validation.jsonl` and its event."""
        self.clock += seconds
        self._append(
            "validation.jsonl",
            {
                "step": self.step,
                "loss": loss,
                "loss_by_modality": {"image": loss},
                "samples": 64,
                "seconds": seconds,
            },
        )
        self.event("validation", step=self.step, loss=loss)

    def end(self, status: str, reason: str, **more: Any) -> None:
        """The ranks end in good order, or say why they failed; the job script notes it."""
        code = {"done": 0, "failed": 1, "usage": 2, "preempted": 75}[status]
        found = {
            "status": status,
            "exit_code": code,
            "steps_done": self.step,
            "reason": reason,
            "rank": 0,
            **more,
        }
        self.event("end", **found)
        (self.directory / "exit.json").write_text(json.dumps({**found, "time": self.text()}))
        self.clock += 2
        self.attempt |= {
            "end": self.text(),
            "status": status,
            "steps_done": self.step,
            "reason": reason,
            **{k: v for k, v in more.items() if k in self.attempt},
        }
        self._row()

    def lose(self, after: float = 30.0) -> None:
        """The node dies: nobody writes anything; the next begin of the job script notes it."""
        self.clock += after
        self.attempt |= {"status": "lost", "steps_done": self.step}
        self._row()

    def event(self, name: str, /, **fields: Any) -> None:
        """A line of `events.jsonl`."""
        self._append("events.jsonl", {"time": self.text(), "event": name, **fields})

    def skipped_sample(self, sample: str, reason: str) -> None:
        """A sample that could not be read."""
        (self.directory / "ledger").mkdir(exist_ok=True)
        self._append(
            "ledger/skipped_samples-rank00003.jsonl",
            {"step": self.step, "sample_id": sample, "reason": reason},
        )

    def text(self) -> str:
        """The clock as files write it."""
        return time.strftime("%Y-%m-%dT%H:%M:%S+0000", time.gmtime(self.clock))

    def settle(self) -> float:
        """Set the files' times to the clock, as they would have been; returns the clock."""
        for name in ("metrics.jsonl", "events.jsonl"):
            if (self.directory / name).exists():
                os.utime(self.directory / name, (self.clock, self.clock))
        return self.clock

    def _row(self) -> None:
        if self.slurm:
            self._append("attempts.jsonl", self.attempt)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.directory / name).open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def eventful(directory: Path) -> MadeRun:
    """Four starts of 1,000 steps: preempted, a lost node with work in vain, a failure, and done on other nodes."""
    run = MadeRun(directory, steps=1000, every=100)
    run.begin()
    run.start(0, checkpoint=0.0)
    run.train(150, every=100)
    run.validate(3.0)
    run.skipped_sample("laion/00017.tar/000170042@0", "JPEG: cut short")
    run.event("skipped_samples", step=150, count=1, total=1)
    run.train(180, every=100)
    run.checkpoint(4.0)
    run.end("preempted", "the file stop")
    run.begin(queue=900.0)
    run.start(330)
    run.train(40, every=100)
    for _ in range(3):
        run.one(seconds=14.0, data_wait_fraction=0.9)
    run.train(110, every=100)
    run.validate(2.4)
    run.train(70, every=100)
    run.lose()
    run.begin(nodes=("gpu02",), queue=200.0)
    run.start(500, checkpoint=30.0)
    run.train(60, every=100)
    run.one(grad_norm=None, applied=False, loss=None)
    run.event(
        "step_skipped",
        step=560,
        reason="the loss is not finite",
        kind="loss_not_finite",
        samples_total=1,
        micro_batches=[{"rank": 3, "micro_batch": 0, "samples": ["laion/00017.tar/1@0"]}],
        samples=[
            {
                "rank": 3,
                "micro_batch": 0,
                "sample": "laion/00017.tar/1@0",
                "modality": "image",
                "nll": None,
            }
        ],
    )
    run.train(60, every=100)
    run.one(grad_norm=48.0)
    run.end(
        "failed",
        "CUDA error: an illegal memory access was encountered",
        failed_step=622,
        offending_samples=["laion/00031.tar/000310099@0"],
    )
    run.begin(nodes=("gpu02", "gpu03"), queue=60.0)
    run.start(600)
    run.train(100, every=100)
    run.checkpoint(22.0)
    run.validate(2.15)
    run.train(300, every=100)
    run.end("done", "1000 steps")
    return run
