"""What of a step's communication computation hides."""

from __future__ import annotations

from dataclasses import replace

import pytest

from onellm_dist.planner.hardware import get_gpu_kind, load_assumptions
from onellm_dist.planner.time import DeviceTime, GpuCluster, HostTime, compute_step
from onellm_dist.train.engine.description import StepTraffic

CLUSTER = GpuCluster(get_gpu_kind("h100"), 1, 8, 100.0)
SECOND = CLUSTER.get_bus(8) * 8 / 7
"""Bytes that take a second among all ranks."""
NONE = StepTraffic(0, 0, 0, 0, 8, 8, 8)
BUSY = [DeviceTime(1.0, 2.0), DeviceTime(3.0, 4.0)]


def measure(busy: list[DeviceTime] = BUSY, **seconds: float) -> tuple[float, float]:
    """Seconds of all communication, and of what is hidden, of what would all be hidden."""
    assumptions = load_assumptions()
    sizes = {name: SECOND * value for name, value in seconds.items()}
    traffic = replace(NONE, **sizes)  # type: ignore[arg-type]  # its sizes are floats
    found = compute_step(
        busy, HostTime(0.5, 0.5), traffic, CLUSTER, assumptions, optimizer_bytes=0.0
    )
    return found.communication, (found.communication - found.exposed) / assumptions.overlap


def test_traffic_within_passes_is_hidden_and_that_of_the_end_is_not() -> None:
    assert measure(gather_micro_batch=0.5) == pytest.approx((1, 1))
    assert measure(gather_step=0.5, reduce_step=0.5) == pytest.approx((1, 0))
    assert measure(gather_first=0.5, reduce_last=1) == pytest.approx((1.5, 1.5))


def test_what_is_moved_once_a_step_has_one_pass_to_hide_behind() -> None:
    """Gathers the first micro-batch's forward, reductions the last one's backward."""
    assert measure(gather_first=5) == pytest.approx((5, 1))
    assert measure(reduce_last=5) == pytest.approx((5, 4))
    quick = [DeviceTime(0.1, 2.0), DeviceTime(3.0, 0.1)]
    assert measure(quick, gather_first=5, reduce_last=5) == pytest.approx((10, 1)), (
        "a pass takes as long as the host"
    )


def test_no_more_is_hidden_than_there_is_computation() -> None:
    assert measure(gather_micro_batch=4, reduce_last=4) == pytest.approx((12, 10))
