"""The arithmetic of the stability monitor: spikes, windows, and when a run is stopped."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from onellm_dist.common.errors import OneLLMError
from onellm_dist.config.schema import StabilitySection
from onellm_dist.train.stability.monitor import Anomaly, StabilityMonitor, robust_z


def make_monitor(**keys: Any) -> StabilityMonitor:
    section = StabilitySection(**{"window": 16, "threshold": 8.0, **keys})
    return StabilityMonitor(section, max_skipped_samples=5)


def feed(monitor: StabilityMonitor, losses: list[float]) -> None:
    for loss in losses:
        assert check(monitor, loss) is None
        monitor.accept(loss, norm_of(loss))


def norm_of(loss: float) -> float:
    return 1.0 + 0.1 * (loss - 2.0)


def check(monitor: StabilityMonitor, loss: float) -> Anomaly | None:
    """With a norm that is nothing special."""
    return monitor.check(loss, norm_of(loss) if abs(loss) < 5 else 1.0)


def noisy(count: int, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [2.0 + generator.gauss(0, 0.1) for _ in range(count)]


def test_z_is_in_robust_standard_deviations() -> None:
    window = [1.0, 2.0, 3.0, 4.0, 100.0]
    assert robust_z(3.0, window, 0.0) == 0
    assert robust_z(3.0 + 1.4826, window, 0.0) == pytest.approx(1.0), (
        "the outlier in the window does not count"
    )
    assert robust_z(4.0, [3.0] * 5, 0.5) == 2.0, "the floor"


def test_a_loss_spike_is_found_and_noise_and_falls_are_not() -> None:
    monitor = make_monitor()
    feed(monitor, noisy(200))
    assert check(monitor, 0.5) is None
    anomaly = check(monitor, 4.0)
    assert anomaly is not None and anomaly.kind == "loss_spike"
    assert "4" in anomaly.reason and "median" in anomaly.reason


def test_nothing_is_a_spike_without_earlier_steps_or_with_threshold_zero() -> None:
    monitor = make_monitor()
    feed(monitor, noisy(7))
    assert monitor.check(1e6, 1e6) is None
    off = make_monitor(threshold=0)
    feed(off, noisy(50))
    assert off.check(1e6, 1e6) is None
    for loss, norm in (
        (float("nan"), 1.0),
        (float("inf"), 1.0),
        (2.0, float("nan")),
        (2.0, float("inf")),
    ):
        assert off.check(loss, norm) is not None, "a value that is not finite always counts"


def test_a_gradient_spike_is_found_and_noise_and_falls_are_not() -> None:
    monitor = make_monitor()
    feed(monitor, noisy(50))
    for norm in (1e-6, 0.5, 2.0, 5.0):
        assert monitor.check(2.0, norm) is None
    anomaly = monitor.check(2.0, 1e4)
    assert anomaly is not None and anomaly.kind == "gradient_spike" and "1e+04" in anomaly.reason
    anomaly = monitor.check(2.0, float("inf"))
    assert anomaly is not None and anomaly.kind == "gradient_not_finite"


def test_a_skipped_step_does_not_move_the_window() -> None:
    monitor = make_monitor()
    feed(monitor, noisy(50))
    for _ in range(40):
        assert check(monitor, 4.0) is not None and monitor.check(2.0, 1e4) is not None
        monitor.count_step(0, applied=True, new_skipped_samples=0)


def test_a_resumed_monitor_decides_as_the_first_one_would() -> None:
    monitor = make_monitor()
    feed(monitor, noisy(50))
    again = StabilityMonitor(
        StabilitySection(window=16, threshold=8.0),
        max_skipped_samples=5,
        state=json.loads(json.dumps(monitor.state())),
    )
    for loss in (2.2, 2.5, 2.7, 2.9, 3.2):
        assert check(monitor, loss) == check(again, loss)
    assert again.state() == monitor.state()


def test_only_steps_skipped_in_a_row_stop_the_run() -> None:
    monitor = StabilityMonitor(StabilitySection(max_skipped=4), max_skipped_samples=5)
    for step in range(12):
        monitor.count_step(step, applied=step % 4 == 0, new_skipped_samples=0)
    with pytest.raises(OneLLMError, match="4 steps in a row, up to step 12"):
        monitor.count_step(12, applied=False, new_skipped_samples=0)


def test_skipped_samples_of_earlier_starts_count() -> None:
    monitor = StabilityMonitor(StabilitySection(), max_skipped_samples=5, skipped_samples=4)
    monitor.count_step(0, applied=True, new_skipped_samples=1)
    with pytest.raises(OneLLMError, match=r"6 samples could not be read, and .*_samples is 5"):
        monitor.count_step(1, applied=True, new_skipped_samples=1)
    monitor = StabilityMonitor(StabilitySection(max_skipped=1), max_skipped_samples=0)
    with pytest.raises(OneLLMError, match=r"^1 sample could not be read"):
        monitor.count_step(0, applied=True, new_skipped_samples=1)
    with pytest.raises(OneLLMError, match=r"^1 step in a row, up to step 1"):
        monitor.count_step(1, applied=False, new_skipped_samples=0)


def test_an_undecided_pair_late_in_a_run_is_no_spike() -> None:
    """The loss of pairs has no floor, and a single pair may have all of the gradient."""
    generator = random.Random(0)
    monitors = {
        pairs: StabilityMonitor(
            StabilitySection(window=128, threshold=10.0), max_skipped_samples=5, pairs=pairs
        )
        for pairs in (False, True)
    }
    for _ in range(128):
        loss = 0.02 + generator.uniform(-0.005, 0.005)
        for monitor in monitors.values():
            assert monitor.check(loss, 1.0) is None
            monitor.accept(loss, 1.0)
    tokens, pairs = monitors[False], monitors[True]
    assert (found := tokens.check(0.2, 1.0)) is not None and found.kind == "loss_spike"
    assert (found := tokens.check(0.02, 20.0)) is not None and found.kind == "gradient_spike"
    assert pairs.check(0.2, 20.0) is None and pairs.check(0.2, 1e4) is None
    assert (found := pairs.check(1.0, 1.0)) is not None and found.kind == "loss_spike"
    assert (found := pairs.check(0.02, float("inf"))) is not None
    assert found.kind == "gradient_not_finite"


@pytest.mark.parametrize("resumed", [False, True])
def test_pairs_without_a_gradient_make_no_spike_of_a_later_one(resumed: bool) -> None:
    config = StabilitySection(window=16, threshold=10.0)
    monitors = [
        StabilityMonitor(config, max_skipped_samples=5, pairs=pairs) for pairs in (False, True)
    ]
    for monitor in monitors:
        if resumed:  # from a checkpoint that knew no floor of pairs
            monitor.restore({"losses": [1e-9] * 16, "log_norms": [math.log(1e-30)] * 16})
        for _ in range(0 if resumed else 16):
            assert monitor.check(1e-9, 0.0) is None
            monitor.accept(1e-9, 0.0)
    tokens, pairs = monitors
    found = tokens.check(1e-9, 1.0)
    assert found is not None and found.kind == "gradient_spike"
    assert pairs.check(1e-9, 1.0) is None
    found = pairs.check(1e-9, 30.0)
    assert found is not None and found.kind == "gradient_spike" and "0.0001" in found.reason


@pytest.mark.parametrize("threshold", [1.0, 5.0, 8.0, 10.0, 20.0, 1e4])
def test_below_27_no_gradient_of_pairs_is_a_spike_whatever_the_threshold(threshold: float) -> None:
    """The loss of these steps makes none: did their norm, all later steps would be skipped."""
    config = StabilitySection(window=16, threshold=threshold)
    monitor = StabilityMonitor(config, max_skipped_samples=5, pairs=True)
    for _ in range(16):
        assert monitor.check(1e-9, 0.0) is None
        monitor.accept(1e-9, 0.0)
    for norm in (1e-3, 1.0, 5.0, 26.8):
        assert monitor.check(0.01, norm) is None
    found = monitor.check(0.01, 27.0)
    assert (found is None) == (threshold == 1e4), "where even 1e-30 is near"
    assert found is None or found.kind == "gradient_spike"


@pytest.mark.parametrize(("before", "after"), [(0.0, 10.0), (5.0, 10.0), (10.0, 5.0), (20.0, 5.0)])
def test_a_resumed_run_may_have_another_threshold(before: float, after: float) -> None:
    """What counts as no gradient is that of today's threshold, not of the checkpoint's."""
    monitors = [
        StabilityMonitor(
            StabilitySection(window=16, threshold=each), max_skipped_samples=5, pairs=True
        )
        for each in (before, after)
    ]
    for monitor in monitors:
        for _ in range(16):
            monitor.accept(1e-9, 0.0)
    first, always = monitors
    resumed = StabilityMonitor(
        StabilitySection(window=16, threshold=after),
        max_skipped_samples=5,
        state=json.loads(json.dumps(first.state())),
        pairs=True,
    )
    for norm in (1e-3, 1.0, 26.8, 27.0, 1e6):
        assert resumed.check(0.01, norm) == always.check(0.01, norm)


def test_a_collapse_of_pairs_to_chance_with_a_huge_gradient_is_a_spike() -> None:
    config = StabilitySection(window=128, threshold=10.0)
    monitor = StabilityMonitor(config, max_skipped_samples=5, pairs=True)
    for _ in range(128):
        monitor.accept(0.02, 1e-3)
    assert monitor.check(math.log(2), 20.0) is None
    found = monitor.check(math.log(2), 1e3)
    assert found is not None and found.kind == "gradient_spike"
