"""The first steps of a recipe, by the plan that a start would open."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.common.run_files import CHECKPOINTS
from onellm_dist.common.text_table import format_table
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.corpus import Corpus, open_datasets
from onellm_dist.data.epochs import describe_length
from onellm_dist.data.plan import Plan
from onellm_dist.data.text import TextEncoder
from onellm_dist.data.token_budget import UNLIMITED, set_budget
from onellm_dist.data.token_counts import find_missing_token_counts
from onellm_dist.train.checkpoint.folder import get_steps_done, list_checkpoints, read_manifest
from onellm_dist.train.records.applied_resumes import was_applied
from onellm_dist.train.setup import follow_checkpoint

STEPS = 3
UNKNOWN = "?"


def format_first_steps(config: RunConfig, model: Any, tokenizer: Any) -> list[str]:
    """Format what the first steps of a start would read: a line each, with samples by dataset.

    Args:
        config: the recipe.
        model: its model; its modalities and the sizes of its encoder count.
        tokenizer: the processor's tokenizer.

    Raises:
        UsageError: a dataset cannot be opened, the recipe's stream is not that of the checkpoint
            that would be resumed, or a sample is larger than a micro-batch.
    """
    plan = _open_plan(config, model, tokenizer)
    folder = find_resumed(config)
    follow_checkpoint(plan, folder)
    first = 0 if folder is None else get_steps_done(read_manifest(folder) or {})
    steps = range(first, min(first + STEPS, config.train.steps))
    ranks = config.launch.ranks or torch.cuda.device_count() or 1
    lines = [describe_length(config.data, plan.corpus.datasets, config.train.steps)]
    if folder is not None:
        lines.append(f"after {folder} ({format_count(first, 'step')} done)")
    if not steps:
        count = config.train.steps
        done = "the only step is" if count == 1 else f"all {count} steps are"
        lines.append(f"none: {done} done")
    else:
        lines += _format_steps(plan, steps, ranks, finds_budgets=config.data.finds_budgets)
    return [f"  {line}" for line in lines]


def find_resumed(config: RunConfig) -> Path | None:
    """Find the checkpoint that a start would resume if its files are intact; nothing is changed.

    Args:
        config: the recipe.

    Returns:
        None if the run would begin at step 0.

    Raises:
        UsageError: the checkpoint that the recipe names is not complete.
    """
    wanted = config.checkpoint.resume
    if wanted == "never" and not was_applied(config.run.dir, wanted, os.environ):
        return None
    if isinstance(wanted, Path) and not was_applied(config.run.dir, wanted, os.environ):
        if read_manifest(wanted) is None:
            raise UsageError(
                f"checkpoint.resume={wanted}: no complete checkpoint there.",
                do="give a step-... folder of a run's checkpoints/, or auto.",
            )
        return wanted
    found = reversed(list_checkpoints(config.run.dir / CHECKPOINTS))
    return next((folder for folder in found if read_manifest(folder) is not None), None)


def _open_plan(config: RunConfig, model: Any, tokenizer: Any) -> Plan:
    data, modalities = config.data, list(model.config.modalities)
    if data.finds_budgets:
        data = set_budget(data, UNLIMITED)
    corpus = Corpus(
        open_datasets(data, modalities),
        data,
        TextEncoder(tokenizer, data.text_format, data.max_text_tokens, pairs=data.preference_pairs),
        config.run.seed,
        modalities,
        sizes=(model.config.vision.patches, model.config.vision.prefix),
    )
    return Plan(corpus)


def _format_steps(
    plan: Plan, steps: Sequence[int], ranks: int, *, finds_budgets: bool
) -> list[str]:
    corpus = plan.corpus
    missing = find_missing_token_counts(
        corpus.datasets, corpus.text_encoder.fingerprint, corpus.split
    )
    names = [dataset.name for dataset in corpus.datasets]
    header = ("step", *names, "samples", "LLM positions", "micro-batches per rank")
    rows = [header]
    for step in steps:
        counts = plan.count_samples(step)
        rows.append((str(step), *map(str, counts), str(sum(counts)), *(UNKNOWN, UNKNOWN)))
        if not missing:
            planned = plan.step(step, ranks)
            count = UNKNOWN if finds_budgets else str(len(planned.assigned[0]))
            sizes = f"{planned.totals.llm_tokens:,}", count
            rows[-1] = (*rows[-1][:-2], *sizes)
    note = f"on {format_count(ranks, 'rank')}"
    if missing:
        shards = format_count(len(missing), "shard")
        note = f"{UNKNOWN}: a start first counts the tokens of {shards}"
    elif finds_budgets:
        note += f"; {UNKNOWN}: a start first finds the token budgets"
    return [*format_table(rows, right=range(len(header))), f"({note})"]
