"""The heartbeat: what this rank is doing right now.

The trainer enters phases; the hang watchdog and `exit.json` read them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from onellm_dist.data.micro_batch import MicroBatch

SampleNames = Callable[[MicroBatch], Sequence[str]]
"""Gives the sample ids of a micro-batch."""


class Heartbeat:
    """Phase, step and micro-batch of this rank.

    Entering a phase costs an assignment; sample names are looked up only when someone asks.

    Attributes:
        phase: `start`, `data`, `forward`, `backward`, `reduce` (the sums over ranks), `apply` (the
            optimizer step), `end` (of a step), `checkpoint`, `validation`, `export`, or the part of
            a start that is under way.
        step: index of the step under way; None outside of steps.
        micro_batch: the micro-batch under way.
        steps_done: optimizer steps done so far; None before training begins.
        first_step_done: whether this start has completed a step.
        count: number of phases entered so far; the rank with the fewest is furthest behind.
        sample_names: gives the sample ids of a micro-batch.
        spans: the modalities of each dataset's samples.
        loader_workers: number of processes that read for this rank; 0: it reads by itself.
    """

    def __init__(self) -> None:
        self.phase = "start"
        self.step: int | None = None
        self.micro_batch: MicroBatch | None = None
        self.steps_done: int | None = None
        self.first_step_done = False
        self.count = 0
        self.sample_names: SampleNames = lambda micro: [str(tuple(ref)) for ref in micro.samples]
        self.spans: Sequence[tuple[str, ...]] = ()
        self.loader_workers = 0
        self._lock = threading.Lock()

    def enter(
        self, phase: str, *, step: int | None = None, micro_batch: MicroBatch | None = None
    ) -> None:
        """Enter `phase`; step and micro-batch stay what they were unless given."""
        with self._lock:
            self.phase = phase
            self.step = self.step if step is None else step
            self.micro_batch = self.micro_batch if micro_batch is None else micro_batch
            self.count += 1

    def leave_step(self, phase: str) -> None:
        """Enter a phase that belongs to no step."""
        with self._lock:
            self.phase = phase
            self.step = None
            self.micro_batch = None
            self.count += 1

    def offending_samples(self) -> list[str]:
        """Ids of the samples of the micro-batch under way.

        Returns:
            [] where no micro-batch is under way, or where its names cannot be read.
        """
        micro = self.micro_batch
        if micro is None or micro.is_empty:
            return []
        try:
            return list(self.sample_names(micro))
        except Exception:  # a broken disk must not hide the failure that is being reported
            return []

    def sample_rows(self) -> list[dict[str, Any]]:
        """Id, modalities, text tokens and supervised tokens of each sample under way."""
        names = self.offending_samples()
        refs = self.micro_batch.samples if self.micro_batch is not None and names else ()
        return [
            {
                "sample": name,
                "modalities": list(self.spans[ref.dataset])
                if ref.dataset < len(self.spans)
                else None,
                "text_tokens": ref.text_tokens,
                "supervised_tokens": ref.supervised_tokens,
            }
            for name, ref in zip(names, refs, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        """Phase, step, count and micro-batch as a JSON object."""
        micro = self.micro_batch
        return {
            "phase": self.phase,
            "step": self.step,
            "heartbeats": self.count,
            "micro_batch": None if micro is None else micro.index,
            "micro_batches": None if micro is None else micro.count,
        }
