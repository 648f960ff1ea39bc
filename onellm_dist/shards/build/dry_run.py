"""A dry run: what a build would do, found from its plan and a few of its raw samples."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import islice
from pathlib import Path

from onellm_dist.common.counts import format_count
from onellm_dist.shards.build.make_plan import make_plan
from onellm_dist.shards.build.plan import save_plan
from onellm_dist.shards.build.request import BuildRequest
from onellm_dist.shards.build.sample_pool import Preparation
from onellm_dist.shards.build.task import BuildJob

_TRIED = 64
"""Raw samples that a dry run reads."""
_TASKS = 8
"""Shard tasks, evenly spread, that they come from."""


def describe_build(request: BuildRequest, *, workers: int) -> str:
    """Describe what a build would do. Nothing is written.

    Args:
        request: what would be built.
        workers: processes that count raw samples where the source does not know the number.

    Returns:
        Lines for the user.
    """
    plan, descriptions = make_plan(
        request.source,
        request.inputs,
        seed=request.seed,
        options=request.options,
        settings=request.settings,
        workers=workers,
    )
    with tempfile.TemporaryDirectory(prefix="onellm-") as folder:
        save_plan(Path(folder), plan, descriptions)
        job = BuildJob(plan, Path(folder), Path(folder), request.inputs, request.options)
        chosen = plan.tasks[:: max(1, len(plan.tasks) // _TASKS)][:_TASKS]
        each = _TRIED // len(chosen)
        tried = [s for task in chosen for s in islice(job.read_raw_samples(task), each)]
        with Preparation(plan, workers=1) as preparation:
            prepared = list(preparation.prepare(tried))
    good = [sample.parts for sample in prepared if sample.parts is not None]
    size = sum(len(data) for parts in good for data in parts.values())
    shards = Counter(task.split for task in plan.tasks)
    gigabytes = size / max(1, len(tried)) * plan.total / 1e9
    lines = [
        f"{request.inputs}: {format_count(len(plan.input_splits), 'input split')}, {plan.total} "
        "raw samples "
        f"of {', '.join(plan.modalities) or 'text'}",
        f"{request.out}: {format_count(len(plan.tasks), 'shard')} or more "
        f"({', '.join(f'{split}: {n}' for split, n in shards.items())})",
        f"tried {len(tried)}: {len(good)} good, about {gigabytes:.3g} GB in all",
        *(f"  {s.where}: {s.reason}" for s in prepared if s.parts is None),
        *plan.notes,
        "nothing was written",
    ]
    return "\n".join(lines)
