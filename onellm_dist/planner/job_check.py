"""What the planner says of a job before it is queued: whether it fits, and ends in time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from onellm_dist.common.errors import OneLLMError
from onellm_dist.planner.command import PlanOptions, explain_shortage, make_planner
from onellm_dist.planner.hardware import get_gpu_kind
from onellm_dist.planner.run_plan import Planner
from onellm_dist.planner.show import format_gb

HOUR_S = 3600


def check_job_plan(
    recipe: Path | str,
    overrides: Sequence[str],
    *,
    gpu: str,
    nodes: int,
    gpus_per_node: int,
    limit_s: int,
) -> list[str]:
    """Plan the run of a job, in lines; those that warn begin with `warning:`.

    A run that cannot be planned is no reason to refuse the job: the first line says why.

    Args:
        recipe: a file, or the name of a recipe that ships.
        overrides: `key=value`.
        gpu: kind of the GPUs.
        nodes: fewest nodes of the job: memory and time are the worst then.
        gpus_per_node: GPUs of each node.
        limit_s: the job's time limit in seconds; 0: none.

    Raises:
        UsageError: there are no constants for this kind of GPU.
    """
    options = PlanOptions(nodes=nodes, gpus_per_node=gpus_per_node, gpu=gpu)
    planner = make_planner_or_explain(recipe, overrides, options)
    if isinstance(planner, str):
        return [f"not planned: {planner}"]
    plan = planner.plan()
    memory, where = plan.memory, f"{nodes} x {gpus_per_node} {planner.cluster.gpu.kind}"
    lines = [
        f"planned on {where}: {format_gb(memory.total)} of {format_gb(memory.capacity)} on each, "
        f"{plan.samples_per_second:.3g} samples/s, {plan.hours:.1f} h"
    ]
    if not memory.fits:
        shortage = [line for line in explain_shortage(memory, planner.config) if line]
        lines += [f"warning: {shortage[0]}", *(f"  {line}" for line in shortage[1:])]
    if 0 < limit_s < plan.hours * HOUR_S:
        starts = -(-plan.hours * HOUR_S // limit_s)
        lines.append(
            f"warning: the run takes {plan.hours:.1f} h, and --time ends the job after "
            f"{limit_s / HOUR_S:.1f} h: it will be requeued and resume, {starts:.0f} starts in all"
        )
    return lines


def make_planner_or_explain(
    recipe: Path | str, overrides: Sequence[str], options: PlanOptions
) -> Planner | str:
    """The planner of a recipe, or why there is none.

    Raises:
        UsageError: there are no constants for the GPU.
    """
    get_gpu_kind(str(options.gpu))
    try:
        planner = make_planner(recipe, overrides, options)
        planner.get_step(planner.config)
    except OneLLMError as error:
        first, *_ = error.what.splitlines()
        return first.rstrip(".")
    return planner
