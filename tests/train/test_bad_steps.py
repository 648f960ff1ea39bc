"""Runs with NaN samples and spikes: steps are skipped, undone by a rollback, or end the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

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


RANKS_AND_ENGINES = [
    (1, "deepspeed"),
    (2, "fsdp"),
    *(pytest.param(4, engine, marks=pytest.mark.soak) for engine in ("deepspeed", "fsdp")),
]
NAN, SPIKE = 5, 10
"""Steps of the bad samples."""


@pytest.fixture(scope="module")
def skipping(runs: Runs, two: str) -> Callable[[int, str], str]:
    """Name of a run with a NaN sample and then one of a steep gradient; what it printed is kept."""

    @cache
    def start(world_size: int, engine: str) -> str:
        name = f"skipped_{world_size}_{engine}"
        plant = {"nan": find_sample(runs, two, NAN), "steep": find_sample(runs, two, SPIKE)}
        more = {"engine__name": "fsdp", "engine__config": ""} if engine == "fsdp" else {}
        run = runs.start(
            name, world_size, plant, stability__window=8, stability__threshold=12, **more
        )
        run.done()
        (runs.out / name / "output.txt").write_text(run.output())
        return name

    return start


@pytest.mark.parametrize(("world_size", "engine"), RANKS_AND_ENGINES)
def test_a_nan_sample_is_skipped_and_named(
    runs: Runs, two: str, skipping: Callable[[int, str], str], world_size: int, engine: str
) -> None:
    bad, name = find_sample(runs, two, NAN), skipping(world_size, engine)
    output = (runs.out / name / "output.txt").read_text()
    same_stream(runs, name, two)
    (event,) = [e for e in runs.events(name, "step_skipped") if e["step"] == NAN]
    (sample,) = event["offending_samples"]
    assert (
        sample["sample"].startswith(f"{bad}@")
        and sample["modality"] == "imu"
        and 0 <= sample["rank"] < world_size
    )
    assert bad in output and "imu, rank" in output
    lines = runs.lines(name, "metrics.jsonl")
    assert [line["applied"] for line in lines] == [s not in (NAN, SPIKE) for s in range(STEPS)]
    if engine == "fsdp":  # the engines agree about what follows
        other = runs.lines(skipping(1 if world_size == 2 else 4, "deepspeed"), "metrics.jsonl")
        assert [line["loss"] for line in lines[NAN + 1 :]] == pytest.approx(
            [line["loss"] for line in other[NAN + 1 :]], rel=1e-4
        )


@pytest.mark.parametrize(
    ("world_size", "what"),
    [(1, "nan"), (2, "spike"), *(pytest.param(n, "spike", marks=pytest.mark.soak) for n in (1, 4))],
)
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


def test_a_loss_spike_is_skipped_before_it_is_applied(
    runs: Runs, two: str, skipping: Callable[[int, str], str]
) -> None:
    nan, bad = find_sample(runs, two, NAN), find_sample(runs, two, SPIKE)
    plant = {"nan": nan, "spike": bad}
    runs.done("spike_skipped", 1, plant, stability__window=8, stability__threshold=12)
    _, event = runs.events("spike_skipped", "step_skipped")
    assert (
        event["anomaly"] == "loss_spike"
        and event["offending_samples"][0]["sample"].startswith(f"{bad}@")
        and event["offending_samples_total"] == 1
    )
    lines = runs.lines("spike_skipped", "metrics.jsonl")
    assert [line["applied"] for line in lines] == [s not in (NAN, SPIKE) for s in range(STEPS)]
    # A step that is skipped for its gradient leaves the same behind.
    steep = runs.lines(skipping(1, "deepspeed"), "metrics.jsonl")
    assert [line["loss"] for line in steep[SPIKE + 1 :]] == [
        line["loss"] for line in lines[SPIKE + 1 :]
    ]


@pytest.mark.parametrize(("world_size", "engine"), RANKS_AND_ENGINES)
def test_a_gradient_spike_is_skipped_before_it_is_applied(
    runs: Runs, two: str, skipping: Callable[[int, str], str], world_size: int, engine: str
) -> None:
    bad, name = find_sample(runs, two, SPIKE), skipping(world_size, engine)
    same_stream(runs, name, two)
    (event,) = [e for e in runs.events(name, "step_skipped") if e["step"] == SPIKE]
    assert event["anomaly"] == "gradient_spike"
    assert any(sample["sample"].startswith(f"{bad}@") for sample in event["offending_samples"])
    assert len(runs.events(name, "step_skipped")) == 2
    lines = runs.lines(name, "metrics.jsonl")
    spike = lines[SPIKE]
    assert spike["grad_norm"] > 12 * lines[SPIKE - 1]["grad_norm"] and spike["loss"] < 10, (
        "the numbers of the skipped step"
    )
    if world_size > 1:
        alone = runs.lines(skipping(1, "deepspeed"), "metrics.jsonl")
        assert [line["loss"] for line in lines if line["step"] != NAN] == pytest.approx(
            [line["loss"] for line in alone if line["step"] != NAN], rel=1e-4
        )


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_a_gradient_spike_is_undone_by_a_rollback_too(
    runs: Runs, two: str, world_size: int
) -> None:
    """Under FSDP2."""
    bad, name = find_sample(runs, two, 10), f"steep_back_{world_size}"
    runs.done(
        name,
        world_size,
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
