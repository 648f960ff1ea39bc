"""Streams of data that are killed at random moments, and start again on other numbers of ranks."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from onellm_dist.data.loader import Loader
from onellm_dist.data.plan import Plan
from onellm_dist.packed import PackedBatch


@dataclass(frozen=True)
class KilledStream:
    """What is read, and on what.

    Attributes:
        open_plan: opens the plan anew.
        describe: a line for each sample of a batch.
        steps: how many steps are read.
        world_sizes: numbers of ranks.
        workers: numbers of workers; where there are four ranks or more, two at most.
    """

    open_plan: Callable[[], Plan]
    describe: Callable[[PackedBatch], list[str]]
    steps: int
    world_sizes: Sequence[int]
    workers: Sequence[int]

    def read(self, folder: Path, seed: int, kills: int) -> tuple[dict[int, list[str]], int]:
        """Read all steps through `kills` kills; the lines of every step, and how often it died.

        A start that comes to its end before the signal is none of them, and another is killed. The
        tests assert both results: after ten starts per kill it returns what it has.
        """
        draw, context = random.Random(seed), multiprocessing.get_context("fork")
        applied: dict[int, list[str]] = {}
        step, killed = 0, 0
        for number in range(10 * kills):
            world_size = draw.choice(self.world_sizes)
            workers = draw.choice([w for w in self.workers if world_size < 4 or w < 2])
            log = folder / f"{number}.jsonl"
            process = context.Process(target=self._start, args=(log, step, world_size, workers))
            process.start()
            signalled = killed < kills
            if signalled:
                left = self.steps - step
                wanted = draw.randint(min(1, left - 1), min(left - 1, max(2, self.steps // kills)))
                while process.is_alive() and not (
                    log.exists() and log.read_bytes().count(b"\n") >= wanted
                ):
                    time.sleep(0.005)
                time.sleep(draw.uniform(0, 0.05))
                process.kill()
            process.join()
            expected = (0, -signal.SIGKILL) if signalled else (0,)
            assert process.exitcode in expected, (
                f"start {number} ({world_size} ranks, {workers} workers): {process.exitcode}"
            )
            killed += process.exitcode != 0
            lines = log.read_text().splitlines(keepends=True) if log.exists() else []
            for at, found in (json.loads(line) for line in lines if line.endswith("\n")):
                assert applied.setdefault(at, found) == found, (
                    f"step {at} differs in start {number} ({world_size} ranks, {workers} workers)"
                )
            done = max(applied, default=-1) + 1
            if done == self.steps and killed >= kills:
                return applied, killed
            step = draw.randint(max(0, min(done, self.steps - 1) - 6), min(done, self.steps - 1))
        return applied, killed

    def _start(self, log: Path, first: int, world_size: int, workers: int) -> None:
        """All ranks of a start, in lockstep; the log gets a line when all have done a step."""
        os.setsid()
        torch.set_num_threads(1)  # the threads of the parent's torch are not there after a fork
        plan = self.open_plan()
        loaders = [
            iter(Loader(plan, world_size, rank, first, self.steps, workers))
            for rank in range(world_size)
        ]
        with log.open("a") as out:
            for step in range(first, self.steps):
                lines: list[str] = []
                for loader in loaders:
                    while True:
                        micro, batch = next(loader)
                        assert micro.step == step
                        lines += self.describe(batch)
                        if micro.last:
                            break
                out.write(json.dumps([step, sorted(lines)]) + "\n")
                out.flush()
