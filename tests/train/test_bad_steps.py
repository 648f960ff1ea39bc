"""Runs with NaN samples and spikes: steps are skipped, undone by a rollback, or end the run."""

from __future__ import annotations

import pytest
from survival_runs import (
    STEPS,
    Runs,
    find_sample,
    make_runs,
    same_stream,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("toy"), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def two(runs: Runs) -> str:
    """Two ranks, never interrupted."""
    runs.done("two")
    return "two"


@pytest.mark.parametrize(
    ("world_size", "engine"), [(1, "deepspeed"), (4, "deepspeed"), (4, "fsdp")]
)
def test_a_nan_sample_is_skipped_and_named(
    runs: Runs, two: str, world_size: int, engine: str
) -> None:
    bad, name = find_sample(runs, two, 5), f"nan_skipped_{world_size}_{engine}"
    more = {"engine__name": "fsdp", "engine__config": ""} if engine == "fsdp" else {}
    start = runs.start(name, world_size, {"nan": bad}, **more)
    start.done()
    same_stream(runs, name, two)
    (event,) = runs.events(name, "step_skipped")
    (sample,) = event["offending_samples"]
    assert (
        event["step"] == 5
        and sample["sample"].startswith(f"{bad}@")
        and sample["modality"] == "imu"
        and 0 <= sample["rank"] < world_size
    )
    assert bad in start.output() and "imu, rank" in start.output()
    lines = runs.lines(name, "metrics.jsonl")
    assert [line["applied"] for line in lines] == [step != 5 for step in range(STEPS)]
    if engine == "fsdp":  # the engines agree about what follows
        other = [line["loss"] for line in runs.lines("nan_skipped_4_deepspeed", "metrics.jsonl")]
        assert [line["loss"] for line in lines[6:]] == pytest.approx(other[6:], rel=1e-4)


@pytest.mark.parametrize(("world_size", "what"), [(1, "nan"), (1, "spike"), (4, "spike")])
def test_a_bad_sample_is_excluded_by_a_rollback(
    runs: Runs, two: str, world_size: int, what: str
) -> None:
    bad, name = find_sample(runs, two, 10), f"{what}_back_{world_size}"
    start = runs.start(
        name,
        world_size,
        {what: bad},
        stability__policy="rollback",
        stability__window=8,
        stability__threshold=12,
    )
    start.done()
    same_stream(runs, name, two)
    (event,) = runs.events(name, "rollback")
    assert (event["step"], event["first_step"], event["excluded"]) == (10, 9, 1)
    assert event["anomaly"] == {"nan": "loss_not_finite", "spike": "loss_spike"}[what]
    assert event["offending_samples"][0]["sample"].startswith(f"{bad}@") and bad in start.output()
    assert all(line["applied"] and line["loss"] < 10 for line in runs.lines(name, "metrics.jsonl"))
    (excluded,) = runs.lines(name, "samples/excluded.jsonl")
    assert excluded["sample_id"].startswith(f"{bad}@") and excluded["step"] == 10
    if what == "spike":
        return
    # The record outlives the start: from a checkpoint before it, at another world size, the sample
    # is left out without another rollback.
    back = runs.out / name / "checkpoints" / "step-00000006"
    before = runs.lines(name, "metrics.jsonl")
    runs.done(name, 2, {what: bad}, stability__policy="rollback", checkpoint__resume=back)
    assert len(runs.events(name, "rollback")) == 1
    for one, other in zip(before, runs.lines(name, "metrics.jsonl"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_loss_spike_is_skipped_before_it_is_applied(runs: Runs, two: str) -> None:
    bad = find_sample(runs, two, 10)
    runs.done("spike_skipped", 1, {"spike": bad}, stability__window=8, stability__threshold=12)
    (event,) = runs.events("spike_skipped", "step_skipped")
    assert (
        event["anomaly"] == "loss_spike"
        and event["offending_samples"][0]["sample"].startswith(f"{bad}@")
        and event["offending_samples_total"] == 1
    )
    assert [line["applied"] for line in runs.lines("spike_skipped", "metrics.jsonl")] == [
        step != 10 for step in range(STEPS)
    ]


@pytest.mark.parametrize(
    ("world_size", "engine"), [(1, "deepspeed"), (4, "deepspeed"), (4, "fsdp")]
)
def test_a_gradient_spike_is_skipped_before_it_is_applied(
    runs: Runs, two: str, world_size: int, engine: str
) -> None:
    bad, name = find_sample(runs, two, 10), f"steep_skipped_{world_size}_{engine}"
    more = {"engine__name": "fsdp", "engine__config": ""} if engine == "fsdp" else {}
    runs.done(
        name, world_size, {"steep": bad}, stability__window=8, stability__threshold=12, **more
    )
    same_stream(runs, name, two)
    (event,) = runs.events(name, "step_skipped")
    assert (event["step"], event["anomaly"]) == (10, "gradient_spike")
    assert any(sample["sample"].startswith(f"{bad}@") for sample in event["offending_samples"])
    lines = runs.lines(name, "metrics.jsonl")
    assert [line["applied"] for line in lines] == [step != 10 for step in range(STEPS)]
    assert lines[10]["grad_norm"] > 12 * lines[9]["grad_norm"] and lines[10]["loss"] < 10, (
        "the numbers of the skipped step"
    )
    if world_size == 1:  # as if the step had been skipped for its loss
        other = runs.lines("spike_skipped", "metrics.jsonl")
        assert [line["loss"] for line in lines[11:]] == [line["loss"] for line in other[11:]]
    else:
        alone = runs.lines("steep_skipped_1_deepspeed", "metrics.jsonl")
        assert [line["loss"] for line in lines] == pytest.approx(
            [line["loss"] for line in alone], rel=1e-4
        )


def test_a_gradient_spike_is_undone_by_a_rollback_too(runs: Runs, two: str) -> None:
    """On 4 ranks under FSDP2."""
    bad, name = find_sample(runs, two, 10), "steep_back"
    runs.done(
        name,
        4,
        {"steep": bad},
        stability__policy="rollback",
        stability__window=8,
        stability__threshold=12,
        engine__name="fsdp",
        engine__config="",
    )
    same_stream(runs, name, two)
    (event,) = runs.events(name, "rollback")
    assert (event["step"], event["first_step"], event["anomaly"]) == (10, 9, "gradient_spike")
    excluded = [entry["sample_id"] for entry in runs.lines(name, "samples/excluded.jsonl")]
    assert any(name.startswith(f"{bad}@") for name in excluded)
    assert all(line["applied"] for line in runs.lines(name, "metrics.jsonl"))


def test_a_loss_spike_stops_the_run_where_that_is_the_policy(runs: Runs, two: str) -> None:
    bad = find_sample(runs, two, 10)
    start = runs.start(
        "spike_stopped",
        1,
        {"spike": bad},
        stability__policy="stop",
        stability__window=8,
        stability__threshold=12,
    )
    assert start.wait() == [1]
    assert bad in start.output() and "stability.policy is stop" in start.output()
    found = runs.exit("spike_stopped")
    assert found["failed_step"] == 10 and any(
        sample.startswith(f"{bad}@") for sample in found["offending_samples"]
    )
    (end,) = runs.events("spike_stopped", "end")
    assert end["status"] == "failed" and end["offending_samples"] == found["offending_samples"]
