"""`pack_budget.json`: token budgets that the planner found, and how an out-of-memory lowered them.

It belongs to the run, not to a checkpoint: budgets change no sample and no loss, and those of an
attempt that ran out of memory must not come back with an older checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.run_files import PACK_BUDGET
from onellm_dist.data.packing import TokenBudget


@dataclass(frozen=True)
class Lowering:
    """One out-of-memory and what followed from it."""

    step: int
    """Index of the step that was under way."""
    rank: int
    world_size: int
    time: str
    before: TokenBudget
    after: TokenBudget
    reason: str


@dataclass(frozen=True)
class BudgetRecord:
    """What is known of the token budgets of a run."""

    identity: str
    """Hash of what they depend on beside the number of ranks: model, engine, device and data."""
    planned: dict[str, TokenBudget] = field(default_factory=dict)
    """Number of ranks to what the planner found."""
    llm_share: float = 1.0
    """Share of the planned LLM budget that is used."""
    encoder_share: float = 1.0
    lowered: tuple[Lowering, ...] = ()
    reported: int = 0
    """How many of `lowered` stand in the events."""

    def get_budget(self, world_size: int) -> TokenBudget:
        """The budgets that this many ranks use; they were planned before."""
        planned = self.planned[str(world_size)]
        return TokenBudget(
            max(1, round(planned.llm * self.llm_share)),
            max(1, round(planned.encoder * self.encoder_share)),
        )

    def lower(self, found: Lowering) -> BudgetRecord:
        """The record after an out-of-memory."""
        planned = self.planned[str(found.world_size)]
        return replace(
            self,
            llm_share=found.after.llm / planned.llm,
            encoder_share=found.after.encoder / planned.encoder,
            lowered=(*self.lowered, found),
        )


def read_budget_record(run_dir: Path) -> BudgetRecord | None:
    """Read the record of a run; None: it has none.

    Raises:
        OneLLMError: the file is damaged.
    """
    path = run_dir / PACK_BUDGET
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return BudgetRecord(
            identity=str(raw["identity"]),
            planned={str(k): TokenBudget(**v) for k, v in raw["planned"].items()},
            llm_share=float(raw["llm_share"]),
            encoder_share=float(raw["encoder_share"]),
            lowered=tuple(map(_read_lowering, raw["lowered"])),
            reported=int(raw["reported"]),
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise OneLLMError(
            f"{path} is damaged or cannot be read: {type(error).__name__}: {error}",
            "the token budgets that an out-of-memory lowered would be lost.",
            "remove it: the planner then finds budgets anew.",
        ) from None


def _read_lowering(raw: dict[str, Any]) -> Lowering:
    budgets = {key: TokenBudget(**raw[key]) for key in ("before", "after")}
    return Lowering(**{**raw, **budgets})


def write_budget_record(run_dir: Path, record: BudgetRecord) -> None:
    """Write the record, durably."""
    write_atomic(run_dir / PACK_BUDGET, json.dumps(asdict(record), indent=1) + "\n")


def count_lowerings(run_dir: Path) -> int:
    """How often an out-of-memory has lowered the budgets of a run; 0 where nothing says it."""
    try:
        record = read_budget_record(run_dir)
    except OneLLMError:
        return 0
    return 0 if record is None else len(record.lowered)
