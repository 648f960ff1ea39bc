"""Data phases: a run whose mixture was changed is a sequence of them, recorded in every checkpoint.

Within a data phase the stream is the pure function that the plan computes. A new data phase starts
its mixture afresh, and every dataset continues where the phases before it stopped: no sample of a
dataset's order is left out or repeated, even if a dataset left the mixture and came back. How far a
dataset was read follows from the data phases alone, in O(period of the mixture).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.config.schema import MOST_SAMPLES, MOST_STEPS
from onellm_dist.data.mixture import EXACT_PERIOD, Mixture

MOST_COUNT = 1 << 53
"""No mixture has a longer period."""


@dataclass(frozen=True)
class DataPhase:
    """What the stream depends on from step `start` on."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    start: Annotated[int, Field(strict=True, ge=0, le=MOST_STEPS)]
    """First step of the phase."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=1 << 63)]
    """The run's seed."""
    split: str
    """The split that is read."""
    global_batch: Annotated[int, Field(strict=True, gt=0, le=MOST_SAMPLES)]
    """Samples per optimizer step."""
    text: str
    """`TextEncoder.fingerprint`: tokenizer, text format and maximum text length."""
    counts: Annotated[Mapping[str, Annotated[int, Field(strict=True, gt=0)]], Field(min_length=1)]
    """Dataset to how often it occurs in one period of the mixture, in the mixture's order."""
    shards: Mapping[str, str]
    """Dataset to the fingerprint of its shards in this split."""

    def to_json(self) -> dict[str, Any]:
        """Return the phase as a JSON object, for `from_json`."""
        return {**asdict(self), "counts": dict(self.counts), "shards": dict(self.shards)}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> DataPhase:
        """Build the phase that `to_json` returned; see `parse_data_phases`."""
        return cls(**raw)

    def same_stream(self, other: DataPhase) -> bool:
        """Return whether both phases, started at the same step, give the same samples."""
        return self._get_identity() == other._get_identity()

    def _get_identity(self) -> dict[str, Any]:
        """Everything but the start; the order of the mixture matters."""
        return {**self.to_json(), "start": 0, "counts": [*self.counts.items()]}


def parse_data_phases(raw: Any, where: str) -> list[DataPhase]:
    """Build the data phases of a run from JSON.

    Args:
        raw: what `to_json` returned of each.
        where: the file, for the message.

    Raises:
        OneLLMError: it is something else, or no run can have such phases.
    """
    try:
        return _PHASES.validate_python(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise OneLLMError(
            f"{where}: the data phases are damaged: {f'{key}: ' if key else ''}{message}",
            "which samples the steps of the run have read is computed from them.",
            "restore the file from a copy, or from the manifest of a checkpoint (data_phases).",
        ) from None


def _check_phases(phases: list[DataPhase]) -> list[DataPhase]:
    for phase in phases:
        if phase.counts.keys() != phase.shards.keys():
            raise ValueError("counts and shards do not name the same datasets")
        most = EXACT_PERIOD if len(phase.counts) == 1 else MOST_COUNT
        if sum(phase.counts.values()) > most:
            raise ValueError("the counts are too large")
    starts = [phase.start for phase in phases]
    if starts[:1] not in ([], [0]) or any(a >= b for a, b in pairwise(starts)):
        raise ValueError("the phases do not begin at step 0 and follow each other")
    return phases


_PHASES = TypeAdapter(Annotated[list[DataPhase], AfterValidator(_check_phases)])


def count_consumed(data_phases: Sequence[DataPhase], step: int) -> dict[str, int]:
    """Return how many samples of each dataset's order the steps before `step` consumed."""
    consumed: dict[str, int] = {}
    starts = [*(data_phase.start for data_phase in data_phases), step]
    for data_phase, end in zip(data_phases, starts[1:], strict=True):
        steps = min(step, end) - data_phase.start
        mixture = Mixture.from_counts(list(data_phase.counts.values()))
        counts = mixture.count_taken(steps * data_phase.global_batch)
        for name, count in zip(data_phase.counts, counts, strict=True):
            consumed[name] = consumed.get(name, 0) + count
    return consumed


def continue_phases(
    history: Sequence[DataPhase], now: DataPhase, step: int, *, allow_new: bool
) -> tuple[DataPhase, ...]:
    """Return the data phases of a run that resumes at `step`.

    Args:
        history: the data phases of the checkpoint. Phases that begin after `step` never took
            place and are dropped.
        now: the phase that the recipe asks for; its start is ignored.
        step: number of steps done.
        allow_new: whether a new data phase may begin (`data.new_phase`).

    Raises:
        UsageError: the recipe asks for another stream and `allow_new` is False, or for a change
            that no data phase can express.
    """
    kept = tuple(data_phase for data_phase in history if data_phase.start <= step)
    last = kept[-1]
    if last.same_stream(now):
        return kept
    _check_change(kept, now, step)
    if not allow_new:
        raise UsageError(
            f"the recipe's data is not that of the checkpoint at step {step}: "
            f"{'; '.join(_list_changes(last, now))}",
            "a resumed run reads the same samples as an uninterrupted one.",
            "restore these keys, or add data.new_phase=true to begin a new data phase at step "
            f"{step}.",
        )
    fresh = DataPhase(**{**now.to_json(), "start": step})
    return (*(data_phase for data_phase in kept if data_phase.start < step), fresh)


def compute_shards_fingerprint(shards: Sequence[Any]) -> str:
    """Return 16 hex digits of the names, sizes and contents of shards (ShardInfo), in order."""
    text = "\n".join(f"{shard.name} {shard.samples} {shard.sha256}" for shard in shards)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def _check_change(kept: Sequence[DataPhase], now: DataPhase, step: int) -> None:
    """Refuse changes that no data phase can express: another seed, or rebuilt shards."""
    last = kept[-1]
    if now.seed != last.seed:
        raise UsageError(
            f"run.seed is {now.seed}, and the checkpoint's is {last.seed}",
            "every dataset would have another order, so samples would be repeated and left out.",
            f"set run.seed={last.seed}, or start a new run (run.dir).",
        )
    known = {name: shards for data_phase in kept for name, shards in data_phase.shards.items()}
    rebuilt = [name for name, shards in now.shards.items() if known.get(name, shards) != shards]
    if rebuilt:
        raise UsageError(
            f"dataset {', '.join(rebuilt)}: its shards are not those that the steps before {step} "
            "read",
            "the same position in its order would mean other samples.",
            "restore the shards, or build the new ones under another name and use that in "
            "data.mixture.",
        )


def _list_changes(old: DataPhase, new: DataPhase) -> list[str]:
    """Return what differs, in the recipe's words."""
    changes = []
    if list(old.counts.items()) != list(new.counts.items()):
        changes.append(f"data.mixture was {_format_shares(old)} and is {_format_shares(new)}")
    for key, before, after in (
        ("data.global_batch", old.global_batch, new.global_batch),
        ("the split", old.split, new.split),
    ):
        if before != after:
            changes.append(f"{key} was {before} and is {after}")
    if old.text != new.text:
        changes.append("the tokenizer, data.text_format or data.max_text_tokens changed")
    return changes or ["shards of a dataset changed"]


def _format_shares(data_phase: DataPhase) -> str:
    total = sum(data_phase.counts.values())
    return " + ".join(
        f"{Fraction(count, total)} {name}" for name, count in data_phase.counts.items()
    )
