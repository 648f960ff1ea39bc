"""Token budgets that nobody had to write down: `data.pack_*_tokens: auto`.

At the start rank 0 asks the planner for the budgets that fit the devices at hand, one value for all
ranks. When a rank runs out of memory in a step, it lowers the budgets of the run for all ranks, and
the start ends; whoever started it starts it again, from the latest checkpoint. How samples are
grouped into micro-batches changes neither the samples of a step nor its loss.

The start must end because nothing reaches the other ranks: in a sharded model a rank that fails
within forward or backward leaves them in a collective that it will never join.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import BudgetLoweredError, OneLLMError
from onellm_dist.common.logging import get_logger
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.packing import TokenBudget
from onellm_dist.data.plan import Plan
from onellm_dist.data.token_budget import find_smallest_budget, set_budget
from onellm_dist.train.distributed import Distributed, name_device
from onellm_dist.train.engine.frozen import can_shard_instead
from onellm_dist.train.records.budget_file import (
    BudgetRecord,
    Lowering,
    read_budget_record,
    write_budget_record,
)
from onellm_dist.train.records.events import Events
from onellm_dist.train.start.planner import load_start_planner

if TYPE_CHECKING:
    from onellm_dist.train.trainer import Trainer

LOWER = 0.8
"""Budgets after an out-of-memory over what the fullest micro-batch of the step held."""
MEMORY_TEXTS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",  # what CUDA allocates beside torch's allocator
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Cuda failure 2 'out of memory'",  # NCCL
    "Cuda failure 'out of memory'",  # older ones of NCCL
)
"""Parts of other errors that mean a lack of memory (torch 2.15)."""
PARTS = {
    "data": (
        "global_batch",
        "max_text_tokens",
        "mixture",
        "preference_pairs",
        "spans",
        "text_format",
    ),
    "train": (
        "activation_checkpointing",
        "compile",
        "dpo",
        "encoder",
        "kernels",
        "lora",
        "loss",
        "parameters",
        "precision",
        "stage",
    ),
}
"""Keys on which budgets depend, beside the sections `model`, `engine` and `optim`."""
SHARD = "engine.frozen=sharded frees what frozen weights take on every rank"
log = get_logger(__name__)


@dataclass(frozen=True)
class PackBudget:
    """The budgets of this start that the planner found."""

    record: BudgetRecord
    budget: TokenBudget
    smallest: TokenBudget
    """What the largest sample needs."""
    world_size: int
    found_now: bool
    """Whether the planner was asked at this start; otherwise the run's record had the answer."""


def resolve_budget(
    config: RunConfig, plans: list[Plan], dist: Distributed
) -> tuple[RunConfig, PackBudget | None]:
    """Find the token budgets of a recipe that says `auto`. All ranks call it together.

    Args:
        config: the recipe.
        plans: the run's plan and that of the validation set; they receive the budgets.
        dist: the ranks.

    Returns:
        The recipe with numbers, and where they come from; the recipe as it is, and None, where it
        has numbers already.

    Raises:
        UsageError: the planner has no constants for the devices, or nothing fits.
    """
    if not config.data.finds_budgets:
        return config, None
    names = sorted(set(dist.gather(name_device(dist.device))))
    found = dist.ask_rank_zero(lambda: _find(config, plans, dist, names))
    for plan in plans:
        plan.set_budget(found.budget)
    data = set_budget(config.data, found.budget)
    return config.model_copy(update={"data": data}), found


def _find(config: RunConfig, plans: list[Plan], dist: Distributed, names: list[str]) -> PackBudget:
    """The run's own record, where it has one for this recipe and these devices; else the planner's.

    What an out-of-memory taught about the devices holds for any number of ranks.
    """
    identity = hash_recipe(config, names)
    smallest = _join(max, [find_smallest_budget(plan.corpus) for plan in plans])
    record = read_budget_record(config.run.dir)
    if record is None or record.identity != identity:
        record = BudgetRecord(identity)
    ranks = str(dist.world_size)
    known = ranks in record.planned
    if not known:
        find = load_start_planner().find_budget
        text = plans[0].count_mean_text(plans[0].data_phases[-1].start)
        budgets = [
            find(
                config,
                device_name=name,
                nodes=max(1, dist.world_size // dist.local_world_size),
                ranks_per_node=min(dist.local_world_size, dist.world_size),
                text_tokens=text,
                least=smallest,
            )
            for name in names
        ]
        record = replace(record, planned={**record.planned, ranks: _join(min, budgets)})
    budget = _join(max, [record.get_budget(dist.world_size), smallest])
    return PackBudget(record, budget, smallest, dist.world_size, not known)


def _join(choose: Callable[..., int], budgets: list[TokenBudget]) -> TokenBudget:
    return TokenBudget(choose(b.llm for b in budgets), choose(b.encoder for b in budgets))


def hash_recipe(config: RunConfig, names: list[str]) -> str:
    """What of a recipe and its devices decides which budgets fit.

    Args:
        config: the recipe.
        names: the devices' names.
    """
    values = config.model_dump(mode="json")
    parts = {
        section: {key: values[section][key] for key in keys} for section, keys in PARTS.items()
    }
    for section in ("model", "engine", "optim"):
        parts[section] = values[section]
    text = json.dumps([parts, names], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def write_budget(
    run_dir: Path, events: Events, found: PackBudget | None, *, is_rank_zero: bool, fresh: bool
) -> None:
    """Record the budgets of this start and what lowered them; rank 0 writes.

    Args:
        run_dir: the run directory, which is that of this start.
        events: where they are recorded.
        found: the budgets; None: the recipe has numbers.
        is_rank_zero: whether this process writes.
        fresh: whether the run starts from nothing, and its earlier events are moved aside.
    """
    if found is None or not is_rank_zero:
        return
    record = found.record
    for each in record.lowered[0 if fresh else record.reported :]:
        events.write(
            "budget_lowered",
            step=each.step,
            rank=each.rank,
            ranks=each.world_size,
            llm_tokens=each.after.llm,
            encoder_tokens=each.after.encoder,
            old_llm_tokens=each.before.llm,
            old_encoder_tokens=each.before.encoder,
            reason=each.reason,
            message=f"step {each.step}: rank {each.rank} ran out of memory: "
            f"{_format_change(each.before, each.after)} for all ranks",
            warning=True,
        )
    source = "found by the planner" if found.found_now else "as recorded for this run"
    planned = record.planned[str(found.world_size)]
    events.write(
        "pack_budget",
        llm_tokens=found.budget.llm,
        encoder_tokens=found.budget.encoder,
        planned_llm_tokens=planned.llm,
        planned_encoder_tokens=planned.encoder,
        lowered=len(record.lowered),
        message=f"token budgets of a micro-batch: {found.budget.llm} in the LLM, "
        f"{found.budget.encoder} in the encoder, {source}"
        + (
            f", lowered {format_count(len(record.lowered), 'time')} since" if record.lowered else ""
        ),
    )
    write_budget_record(run_dir, replace(record, reported=len(record.lowered)))


def _format_change(before: TokenBudget, after: TokenBudget) -> str:
    return (
        f"the token budgets fall from {before.llm} to {after.llm} (LLM) and from {before.encoder} "
        f"to {after.encoder} (encoder)"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device had no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in MEMORY_TEXTS)


@contextmanager
def lower_budgets(trainer: Trainer) -> Iterator[None]:
    """Lower the budgets of the run if this rank runs out of memory in a step or a validation.

    Raises:
        BudgetLoweredError: it did; the run must be started again.
        OneLLMError: it did, and the budgets cannot be lower.
    """
    try:
        yield
    except RuntimeError as error:
        step = trainer.heartbeat.step
        if step is None and trainer.heartbeat.phase == "validation":
            step = trainer.state.step
        if not is_out_of_memory(error):
            raise
        if trainer.budget is None or step is None:
            if hint := _say_shard(trainer):
                log.error("rank %d ran out of memory.%s", trainer.dist.rank, hint)
            raise
        raise _lower(trainer, trainer.budget, step, error) from error


def _say_shard(trainer: Trainer) -> str:
    """A sentence on frozen weights that could be sharded; nothing where they could not."""
    engine, bf16 = trainer.config.engine, trainer.config.train.precision == "bf16"
    possible = trainer.dist.world_size > 1 and can_shard_instead(engine, bf16=bf16)
    return f" {SHARD}." if possible else ""


def _lower(trainer: Trainer, found: PackBudget, step: int, error: BaseException) -> OneLLMError:
    """Lower the budgets in the run's record, and say so.

    Ranks that run out of memory together all write; from the same budgets they come to the same.
    """
    dist, before = trainer.dist, found.budget
    fullest = trainer.plan.find_fullest(step, dist.world_size)
    after = TokenBudget(
        *(
            max(least, int(LOWER * min(own, held)))
            for least, own, held in (
                (found.smallest.llm, before.llm, fullest.llm),
                (found.smallest.encoder, before.encoder, fullest.encoder),
            )
        )
    )
    what = f"step {step}: rank {dist.rank} ran out of memory"
    shard = _say_shard(trainer)
    if after.llm >= before.llm and after.encoder >= before.encoder:
        return OneLLMError(
            f"{what} with the smallest token budgets, {before.llm} and {before.encoder}",
            "they hold the largest sample alone, and a micro-batch holds whole samples.",
            "train on more GPUs, with train.activation_checkpointing=full or an engine that shards "
            f"more; or lower data.max_text_tokens or data.spans.{shard}",
        )
    reason = " ".join(str(error).split())[:300]
    lowering = Lowering(
        step,
        dist.rank,
        dist.world_size,
        time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        before,
        after,
        reason,
    )
    record = replace(found.record, reported=len(found.record.lowered))  # by this start
    write_budget_record(trainer.config.run.dir, record.lower(lowering))
    return BudgetLoweredError(
        f"{what}: {_format_change(before, after)} for all ranks. {reason}",
        "a sharded step cannot continue without this rank; its samples and its loss stay the same.",
        "start the run again: it resumes from its latest checkpoint with these budgets. Job "
        f"scripts and `onellm train` with local ranks do that by themselves.{shard}",
    )
