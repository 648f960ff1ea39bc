"""How long a step takes: a roofline over the model's operations, the host, and communication.

An operation takes as long as its FLOPs at the rate that its kind reaches, or as its bytes, or as a
kernel's shortest time, whichever is longest. A micro-batch takes as long as the slowest of device
and host in each direction. What of communication computation cannot hide is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onellm_dist.planner.cost_model import Floats, OperationGroup, PackCostModel
from onellm_dist.planner.counting import ATTENTION, FLOAT8_PRODUCT
from onellm_dist.planner.hardware import FLOAT8, GIGA, Assumptions, GpuKind, HostAssumption
from onellm_dist.planner.pack_shapes import PackSizes
from onellm_dist.train.engine.description import HostCosts, StepTraffic

CONVOLUTIONS = frozenset({"aten::convolution", "aten::convolution_backward"})
MICRO = 1e-6


@dataclass(frozen=True)
class GpuCluster:
    """The machine that a run is planned for."""

    gpu: GpuKind
    nodes: int
    gpus_per_node: int
    network_gb_s: float
    """Rate of a node's network links together, in gigabytes per second."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.gpus_per_node

    def get_bus(self, ranks: int) -> float:
        """Bytes per second of a collective among neighbouring ranks."""
        if ranks <= self.gpus_per_node:
            return GIGA * self.gpu.node_bus_gb_s
        across = GIGA * self.network_gb_s * self.gpu.network_share
        return min(across, GIGA * self.gpu.node_bus_gb_s)


class GroupRates:
    """FLOP/s that the operations of a group reach.

    Args:
        group: the operations.
        gpu: the device.
        precision: `train.precision`.
    """

    def __init__(self, group: OperationGroup, gpu: GpuKind, precision: str) -> None:
        share = np.full(len(group.names), gpu.matmul_share)
        for names, value in (
            (ATTENTION, gpu.attention_share),
            (CONVOLUTIONS, gpu.convolution_share),
        ):
            share[[name in names for name in group.names]] = value
        usual = gpu.peak_tflops[precision]
        peaks = np.full(len(group.names), usual)
        is_float8 = [name == FLOAT8_PRODUCT for name in group.names]
        peaks[is_float8] = gpu.peak_tflops.get(FLOAT8, usual)
        self._rates: Floats = peaks * 1e12 * share
        self._group = group
        self._short = gpu.short_inner

    def compute(self, sizes: PackSizes) -> Floats:
        """FLOP/s of each operation in a micro-batch, [n]: thin matrix products are slower."""
        return self._rates / (1 + self._short / self._group.measure_products(sizes))


@dataclass(frozen=True)
class DeviceTime:
    """Seconds of a micro-batch on the device."""

    forward: float
    backward: float
    """Recomputation included."""


class DeviceClock:
    """Seconds that micro-batches take on a GPU by roofline.

    Args:
        costs: what micro-batches do.
        gpu: the device.
        precision: `train.precision`.
    """

    def __init__(self, costs: PackCostModel, gpu: GpuKind, precision: str) -> None:
        self._costs = costs
        self._gpu = gpu
        self._rates = [GroupRates(group, gpu, precision) for group in costs.groups]
        self._known: dict[tuple[tuple[str, float], ...], DeviceTime] = {}

    def measure(self, sizes: PackSizes) -> DeviceTime:
        """Seconds of a micro-batch of these sizes."""
        key = tuple(sorted(sizes.values.items()))
        if key not in self._known:
            self._known[key] = self._measure(sizes)
        return self._known[key]

    def _measure(self, sizes: PackSizes) -> DeviceTime:
        seconds = {"forward": 0.0, "backward": 0.0}
        shortest = self._gpu.launch_us * MICRO
        for group, rates in zip(self._costs.groups, self._rates, strict=True):
            flops, moved = group.evaluate(sizes)
            time = np.maximum(flops / rates.compute(sizes), moved / self._gpu.bandwidth)
            # An operation on nothing launches no kernel.
            time = np.where(moved >= 1, np.maximum(time, shortest), 0.0)
            direction = "forward" if group.phase == "forward" else "backward"
            seconds[direction] += float((time * group.repeats).sum())
        return DeviceTime(**seconds)


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step and what they go into."""

    device: float
    """The micro-batches on the device, each as long as on the slowest rank."""
    host: float
    """What the host needs longer than the device."""
    communication: float
    """All collectives, whether hidden or not."""
    exposed: float
    """Collectives that computation does not hide."""
    optimizer: float
    tail: float
    """After the step, while the device is idle."""

    @property
    def total(self) -> float:
        """The step."""
        return self.device + self.host + self.exposed + self.optimizer + self.tail

    def to_json(self) -> dict[str, float]:
        """The numbers, in seconds."""
        return {**vars(self), "total": self.total}


@dataclass(frozen=True)
class HostTime:
    """Seconds of the host for a micro-batch."""

    forward: float
    backward: float


def compute_host(costs: PackCostModel, engine: HostCosts, host: HostAssumption) -> HostTime:
    """Host time of a micro-batch: its modules and ATen calls, and the engine's hooks."""
    calls, modules = costs.calls, costs.modules

    def run(phase: str) -> float:
        return host.call_us * calls[phase] + (host.module_us + engine.forward_us) * modules[phase]

    backward = host.backward_call_us * calls["backward"] + engine.backward_us * modules["forward"]
    return HostTime(MICRO * run("forward"), MICRO * (run("recompute") + backward))


def compute_step(
    micro_batches: Sequence[DeviceTime],
    host: HostTime,
    traffic: StepTraffic,
    cluster: GpuCluster,
    assumptions: Assumptions,
    *,
    optimizer_bytes: float,
) -> StepTime:
    """Time of a step.

    Args:
        micro_batches: the slowest rank's time of each micro-batch, of one at least.
        host: host time of a micro-batch.
        traffic: what the engine's collectives move.
        cluster: the machine.
        assumptions: how much of communication is hidden, and the host's work after a step.
        optimizer_bytes: bytes that the optimizer reads and writes on a rank.
    """
    device = sum(time.forward + time.backward for time in micro_batches)
    busy = sum(
        max(time.forward, host.forward) + max(time.backward, host.backward)
        for time in micro_batches
    )
    gather, reduce = traffic.gather_ranks, traffic.reduce_ranks
    within = len(micro_batches) * _move(traffic.gather_micro_batch, gather, cluster)
    within += len(micro_batches) * _move(traffic.reduce_micro_batch, reduce, cluster)
    first = _move(traffic.gather_first, gather, cluster)
    last = _move(traffic.reduce_last, reduce, cluster)
    once = _move(traffic.gather_step + traffic.reduce_step, traffic.step_ranks, cluster)
    communication = within + first + last + once
    # What is gathered or reduced once has one pass to hide behind.
    hideable = within
    hideable += min(first, max(micro_batches[0].forward, host.forward))
    hideable += min(last, max(micro_batches[-1].backward, host.backward))
    hidden = min(hideable, busy) * assumptions.overlap
    return StepTime(
        device=device,
        host=busy - device,
        communication=communication,
        exposed=communication - hidden,
        optimizer=optimizer_bytes / cluster.gpu.bandwidth,
        tail=assumptions.host.step_ms / 1000,
    )


def _move(size: float, ranks: int, cluster: GpuCluster) -> float:
    """Seconds of collectives over `size` bytes in rings of `ranks`."""
    return size * (ranks - 1) / ranks / cluster.get_bus(ranks)
