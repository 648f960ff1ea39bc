"""What this rank is doing right now: the loop says it, the watchdog and `exit.json` read it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from onellm_dist.data.micro_batch import MicroBatch

Names = Callable[[MicroBatch], Sequence[str]]
"""Sample ids of a micro-step."""
Following = Callable[[MicroBatch], Sequence[MicroBatch]]
"""The micro-steps of this rank that its loader reads ahead while it is at one."""


class InFlight:
    """Step, phase and micro-step of this rank. Saying so costs an assignment; names are looked up only when someone asks.

    Attributes:
        phase: `start`, `data`, `forward`, `backward`, `agree` (the sums over the ranks), `step` (the optimizer's), `end` (of a step
            that is done), `checkpoint`, `validation`, `export`, ...
        step: index of the step under way; None outside the steps.
        micro: the micro-step under way.
        beats: how often the rank said something: the rank with the fewest lags.
    """

    def __init__(self) -> None:
        self.phase = "start"
        self.step: int | None = None
        self.micro: MicroBatch | None = None
        self.first_step_done = False
        self.beats = 0
        self.names: Names = lambda micro: [str(tuple(ref)) for ref in micro.samples]
        self.spans: Sequence[tuple[str, ...]] = ()
        """The modalities of each dataset's samples."""
        self.following: Following = lambda micro: ()
        """All three are set by whoever knows the plan."""
        self._lock = threading.Lock()

    def beat(self, phase: str, *, step: int | None = None, micro: MicroBatch | None = None) -> None:
        """The rank goes on with `phase`; step and micro-step stay what they were unless given."""
        with self._lock:
            self.phase = phase
            self.step = self.step if step is None else step
            self.micro = self.micro if micro is None else micro
            self.beats += 1

    def rest(self, phase: str) -> None:
        """The rank goes on with something that belongs to no step."""
        with self._lock:
            self.phase, self.step, self.micro = phase, None, None
            self.beats += 1

    def suspects(self, *, read_ahead: bool = False) -> list[str]:
        """Ids of the samples of the micro-step under way; [] where there is none, or their names cannot be read.

        Args:
            read_ahead: also those that the loader's workers were reading for later micro-steps (it was a worker that died).
        """
        micro = self.micro
        if micro is None:
            return []
        try:
            return [
                name
                for m in (micro, *(self.following(micro) if read_ahead else ()))
                if not m.is_empty
                for name in self.names(m)
            ]
        except Exception:  # a broken disk must not hide the failure that is being reported
            return []

    def rows(self) -> list[dict[str, Any]]:
        """The samples of the micro-step under way: sample, modalities, text_tokens, supervised_tokens."""
        names = self.suspects()
        refs = self.micro.samples if self.micro is not None and names else ()
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

    def about(self) -> dict[str, Any]:
        """All of it, for JSON."""
        micro = self.micro
        return {
            "phase": self.phase,
            "step": self.step,
            "beats": self.beats,
            "micro_batch": None if micro is None else micro.index,
            "micro_batches": None if micro is None else micro.count,
        }
