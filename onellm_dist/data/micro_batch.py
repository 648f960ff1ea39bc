"""The values that plan, reader, model and watchdog share: which samples one rank runs in one micro-step of one step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class SampleRef(NamedTuple):
    """One sample of the stream, by place; names are looked up in the dataset's manifest."""

    dataset: int
    """Index of the dataset in the mixture."""
    shard: int
    """Index of the shard in the dataset's manifest."""
    row: int
    """Row of the sample in the shard's index."""
    epoch: int
    """How often the dataset had been gone through before."""
    text_tokens: int
    """Tokens of the sample's text, BOS included (from the length sidecar)."""
    supervised_tokens: int
    """Of these, the ones that are targets."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward of one rank. Equal on every rank that computes the plan."""

    step: int
    rank: int
    index: int
    """0 .. count - 1 within the step."""
    count: int
    """Micro-steps of this step: the same for every rank."""
    samples: tuple[SampleRef, ...]
    """In pack order; empty: the rank was assigned nothing and runs a dummy token of zero weight."""
    global_valid_tokens: int
    """Supervised tokens of the whole global batch, by the plan (skipped_samples count)."""

    @property
    def is_empty(self) -> bool:
        """No sample was assigned to this rank."""
        return not self.samples

    @property
    def last(self) -> bool:
        """The optimizer step follows this micro-step."""
        return self.index == self.count - 1


@dataclass(frozen=True)
class StepPlan:
    """The global batch of one step, assigned to ranks."""

    step: int
    global_valid_tokens: int
    ranks: Sequence[tuple[MicroBatch, ...]]
    """[world][count]. A plan makes a rank's when it is asked for: a rank needs its own, and thousands of objects a step less."""
    balance: float = 1.0
    """Predicted cost of the costliest micro-step over the mean of all."""

    def digest(self) -> str:
        """Hash over everything a rank will do in this step: equal on all ranks, or the run must stop."""
        h = hashlib.sha256()
        for rank in self.ranks:
            for micro in rank:
                h.update(
                    repr(
                        (
                            micro.step,
                            micro.rank,
                            micro.index,
                            micro.count,
                            micro.global_valid_tokens,
                            [tuple(s) for s in micro.samples],
                        )
                    ).encode()
                )
        return h.hexdigest()
