"""SequenceLengths: a run whose mixture was changed is a list of them, each from a start step on, recorded in every checkpoint.

Within a data_phase the stream is the pure function of the plan. A new data_phase begins its mixture anew and every dataset goes on
where the data_phases before it stopped: no sample of a dataset's order is left out or comes twice, also where a dataset left the
mixture and came back. How far a dataset was read follows from the data_phases alone, in O(period of the mixture).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.data.mixture import Mixture


@dataclass(frozen=True)
class DataPhase:
    """What the stream depends on from `start` on."""

    start: int
    """First step."""
    seed: int
    split: str
    global_batch: int
    text: str
    """`TextEncoder.fingerprint`: tokenizer, text format and longest text."""
    counts: Mapping[str, int]
    """Dataset -> how often it occurs in a period of the mixture, in the mixture's order."""
    shards: Mapping[str, str]
    """Dataset -> fingerprint of the shards of its split."""

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` reads it."""
        return {**asdict(self), "counts": dict(self.counts), "shards": dict(self.shards)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> DataPhase:
        """See `to_json`."""
        return cls(**raw)

    def same_stream(self, other: DataPhase) -> bool:
        """Whether both, begun at one step, give the same samples."""
        return {**self.to_json(), "start": 0, "counts": [*self.counts.items()]} == {
            **other.to_json(),
            "start": 0,
            "counts": [*other.counts.items()],
        }


def consumed(data_phases: Sequence[DataPhase], step: int) -> dict[str, int]:
    """Dataset -> samples of its order that the steps before `step` took."""
    taken: dict[str, int] = {}
    for number, data_phase in enumerate(data_phases):
        end = min(step, data_phases[number + 1].start if number + 1 < len(data_phases) else step)
        counts = Mixture.of_counts(list(data_phase.counts.values())).taken(
            (end - data_phase.start) * data_phase.global_batch
        )
        for name, count in zip(data_phase.counts, counts, strict=True):
            taken[name] = taken.get(name, 0) + count
    return taken


def go_on(
    history: Sequence[DataPhase], now: DataPhase, step: int, *, allow_new: bool
) -> tuple[DataPhase, ...]:
    """The data_phases of a run that is resumed at `step` with the stream of `now`.

    Args:
        history: the data_phases of the checkpoint; those that begin after `step` never came to pass.
        now: what the recipe asks for; its start does not matter.
        allow_new: `data.new_phase`.

    Raises:
        UsageError: it is another stream, and nobody allowed a new data_phase; or a change that no data_phase can carry.
    """
    kept = tuple(data_phase for data_phase in history if data_phase.start <= step)
    last = kept[-1]
    if last.same_stream(now):
        return kept
    changes = _changes(last, now)
    if now.seed != last.seed:
        raise UsageError(
            f"run.seed is {now.seed}, and the checkpoint's {last.seed}",
            "every dataset would be in another order, so samples would be repeated and left out.",
            f"set run.seed={last.seed}, or start a new run (run.dir).",
        )
    known = {name: shards for data_phase in kept for name, shards in data_phase.shards.items()}
    rebuilt = [name for name, shards in now.shards.items() if known.get(name, shards) != shards]
    if rebuilt:
        raise UsageError(
            f"dataset {', '.join(rebuilt)}: its shards are not those that the steps before {step} read",
            "the place in its order would mean other samples.",
            "restore the shards, or build the new ones under another name and put that into data.mixture.",
        )
    if not allow_new:
        raise UsageError(
            f"the recipe's stream is not that of the checkpoint at step {step}: {'; '.join(changes)}",
            "a resumed run gives the same samples as an undisturbed one, unless it is told not to.",
            f"restore these keys, or add data.new_phase=true to begin a new plan data_phase at step {step}.",
        )
    fresh = DataPhase(**{**now.to_json(), "start": step})
    return (*(data_phase for data_phase in kept if data_phase.start < step), fresh)


def shards_fingerprint(shards: Sequence[Any]) -> str:
    """16 hex digits of the names, sizes and contents of some shards (ShardInfo), in order."""
    text = "\n".join(f"{shard.name} {shard.samples} {shard.sha256}" for shard in shards)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _changes(old: DataPhase, new: DataPhase) -> list[str]:
    """In the recipe's words, what differs."""
    found = []
    if list(old.counts.items()) != list(new.counts.items()):
        found.append(f"data.mixture was {_shares(old)} and is {_shares(new)}")
    for key, before, after in (
        ("data.global_batch", old.global_batch, new.global_batch),
        ("the split", old.split, new.split),
    ):
        if before != after:
            found.append(f"{key} was {before} and is {after}")
    if old.text != new.text:
        found.append("the tokenizer, data.text_format or data.max_text_tokens changed")
    return found or ["shards of a dataset changed"]


def _shares(data_phase: DataPhase) -> str:
    total = sum(data_phase.counts.values())
    return " + ".join(
        f"{Fraction(count, total)} {name}" for name, count in data_phase.counts.items()
    )
