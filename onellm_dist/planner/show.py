"""A plan as a table for people, and as JSON for scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.config.schema import RunConfig
from onellm_dist.planner.hardware import GIGA
from onellm_dist.planner.run_plan import RunPlan
from onellm_dist.planner.time import GpuCluster

Rows = list[tuple[str, str]]


def make_json(
    plan: RunPlan, config: RunConfig, cluster: GpuCluster, notes: Sequence[str]
) -> dict[str, Any]:
    """All numbers of a plan, in bytes and seconds.

    Args:
        plan: the plan.
        config: its recipe.
        cluster: its machine.
        notes: what was assumed.
    """
    return {
        "gpu": cluster.gpu.kind,
        "nodes": cluster.nodes,
        "gpus_per_node": cluster.gpus_per_node,
        "network_gb_s": cluster.network_gb_s,
        "calibration": {
            "date": str(cluster.gpu.date),
            "sources": list(cluster.gpu.sources),
            "measured": list(cluster.gpu.measured),
        },
        "engine": plan.engine,
        "recompute": config.train.activation_checkpointing,
        "parameters": plan.parameters.to_json(),
        "memory": plan.memory.to_json(),
        "micro_batches": plan.micro_batches,
        "largest_micro_batch": describe_pack(plan),
        "step_seconds": plan.time.to_json(),
        "traffic": vars(plan.traffic),
        "samples_per_second": plan.samples_per_second,
        "samples_per_second_per_gpu": plan.samples_per_second / cluster.world_size,
        "flops_per_step": plan.flops,
        "mfu": plan.mfu,
        "loading": vars(plan.loading),
        "checkpoint": vars(plan.checkpoint),
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "energy": {
            "kwh": plan.energy_kwh,
            "board_watts": cluster.gpu.board_watts,
            "source": cluster.gpu.power_source,
        },
        "assumed": list(notes),
    }


def describe_pack(plan: RunPlan) -> dict[str, int]:
    """The samples of the largest micro-batch: combination to number."""
    return dict(Counter("+".join(sample.spans) or "text" for sample in plan.largest))


def format_gb(size: float) -> str:
    """Bytes in gigabytes."""
    return f"{size / GIGA:.2f} GB"


def make_memory_rows(plan: RunPlan) -> Rows:
    """The memory of a rank, part by part."""
    memory, state = plan.memory, plan.memory.state
    rows: list[tuple[str, float]] = [
        ("weights, frozen", state.frozen_weights),
        ("weights, trained", state.trained_weights),
        *([("weights, gathered for a step", state.gathered)] if state.gathered else []),
        ("gradients", state.gradients),
        ("optimizer and fp32 weights", state.optimizer),
        *((f"activations: {part}", size) for part, size in memory.activations.items()),
        ("working memory of forward and backward", memory.working),
        ("micro-batches", memory.inputs),
        ("engine buffers", memory.buffers),
        ("CUDA context and NCCL", memory.context),
        ("fragmentation margin", memory.fragmentation),
    ]
    total = [("total", memory.total), ("device", memory.capacity)]
    host = [("host memory (offloaded)", state.host)] if state.host else []
    return [(name, format_gb(size)) for name, size in (*rows, *total, *host)]


def make_speed_rows(plan: RunPlan, cluster: GpuCluster) -> Rows:
    """Speed, traffic and what a run takes."""
    time, loading, saved = plan.time, plan.loading, plan.checkpoint
    pack = ", ".join(f"{count} {name}" for name, count in describe_pack(plan).items())
    per_gpu = plan.samples_per_second / cluster.world_size
    traffic = plan.traffic
    gathered = traffic.count_gathered(plan.micro_batches)
    reduced = traffic.count_reduced(plan.micro_batches)
    times = format_count(saved.count, "time")
    waits = f"{saved.stall:.2f} s " + (
        "for each" if saved.asynchronous else "and its write, which is not in the hours"
    )
    return [
        ("micro-batches a step", f"{plan.micro_batches} (largest: {pack})"),
        ("step", f"{time.total:.3f} s"),
        ("  device", f"{time.device:.3f} s"),
        ("  waiting for the host", f"{time.host:.3f} s"),
        ("  communication", f"{time.communication:.3f} s, {time.exposed:.3f} s not hidden"),
        ("  optimizer and end of step", f"{time.optimizer + time.tail:.3f} s"),
        (
            "traffic of a rank and step",
            f"{format_gb(gathered)} gathered, {format_gb(reduced)} reduced",
        ),
        ("samples/s", f"{plan.samples_per_second:.0f} ({per_gpu:.1f} a GPU)"),
        ("MFU", f"{100 * plan.mfu:.1f}%"),
        ("loader", f"{loading.cores_per_gpu:.1f} cores a GPU, {loading.read_mb_s:.0f} MB/s a node"),
        ("checkpoint", f"{format_gb(saved.bytes)}, {times}; training waits {waits}"),
        ("run", f"{plan.hours:.1f} h, {plan.gpu_hours:.0f} GPU hours"),
        *make_energy_rows(plan, cluster),
    ]


def make_energy_rows(plan: RunPlan, cluster: GpuCluster) -> Rows:
    """What the boards draw at most, where their power is known."""
    gpu = cluster.gpu
    if plan.energy_kwh is None or gpu.board_watts is None:
        return []
    drawn = f"{plan.energy_kwh:.3g} kWh at most, at {gpu.board_watts:.0f} W a board"
    return [("energy", f"{drawn} ({gpu.power_source}); hosts and cooling not counted")]


def format_rows(title: str, rows: Rows) -> Iterator[str]:
    """A titled block of lines with aligned values."""
    width = max(len(name) for name, _ in rows)
    yield title
    yield from (f"  {name:<{width}}  {value}" for name, value in rows)


def format_plan(
    plan: RunPlan, config: RunConfig, cluster: GpuCluster, notes: Sequence[str]
) -> Iterator[str]:
    """A plan for people, line by line.

    Args:
        plan: the plan.
        config: its recipe.
        cluster: its machine.
        notes: what was assumed.
    """
    counts, gpu = plan.parameters, cluster.gpu
    yield (
        f"{cluster.world_size} x {gpu.kind} ({cluster.nodes} x {cluster.gpus_per_node}), "
        f"{plan.engine}, recompute {config.train.activation_checkpointing}; "
        f"{counts.total / 1e9:.2f} B parameters, {counts.trainable / 1e6:.0f} M train"
    )
    yield ""
    yield from format_rows("Memory of a rank", make_memory_rows(plan))
    yield ""
    yield from format_rows("Speed", make_speed_rows(plan, cluster))
    yield ""
    yield from (f"assumed: {note}" for note in notes)
    if gpu.measured:
        yield f"constants of {gpu.kind}: {gpu.date}; measured: {', '.join(gpu.measured)}"
    else:
        yield f"constants of {gpu.kind}: {gpu.date}; nothing was measured for this plan"
