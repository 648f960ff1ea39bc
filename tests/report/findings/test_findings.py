"""What the report says first about runs that went well, or did not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import RecordedRun, load_eventful_run

from onellm_dist.report.facts import RunFacts, load_facts
from onellm_dist.report.findings.collect import collect_findings


@pytest.fixture(scope="module")
def eventful_run(tmp_path_factory: pytest.TempPathFactory) -> RunFacts:
    return load_eventful_run(tmp_path_factory)


def get_text(facts: RunFacts) -> str:
    return " | ".join(finding.text for finding in collect_findings(facts))


def test_incidents_are_found_and_described(eventful_run: RunFacts) -> None:
    incidents = eventful_run.incidents
    assert [s.step for s in incidents.slow_steps] == [370, 371, 372]
    assert incidents.slow_steps[0].waited == 0.9
    assert [e["step"] for e in incidents.skipped_steps] == [560]
    assert len(incidents.skipped_samples) == 1 and incidents.checkpoints[0]["seconds"] == 22.0
    text = get_text(eventful_run)
    for words in (
        "Goodput is",
        "75 steps were lost",
        "1 step was skipped: the loss was not finite (the last: step 560)",
        "could not be read",
        "One checkpoint took 22 s",
        "8, 16",
    ):
        assert words in text, words


def test_one_lost_step_is_singular(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.allocate()
    run.start(0)
    run.train(51)
    run.lose_node()
    run.allocate()
    run.start(50)
    run.train(150)
    run.end("done", "200 steps")
    assert "1 step was lost" in get_text(load_facts(run.directory, now=run.set_file_times()))


def test_two_failures_at_one_step_are_a_crash_loop_and_a_node_in_both_is_named(
    tmp_path: Path,
) -> None:
    run = RecordedRun(tmp_path / "run")
    run.allocate(nodes=("gpu01", "gpu02"))
    run.start(0)
    run.train(60)
    run.end("preempted", "TERM")
    for nodes in (("gpu02", "gpu07"), ("gpu03", "gpu07")):
        run.allocate(nodes=nodes, queue=60)
        run.start(60)
        run.train(5)
        run.end(
            "failed",
            "RuntimeError: boom",
            failed_step=65,
            offending_samples=["a/1@0", f"a/{nodes[0]}@0"],
        )
    text = get_text(load_facts(run.directory, now=run.set_file_times()))
    assert "2 starts failed at step 65" in text and "Offending samples each time: a/1@0" in text
    assert "--exclude=gpu07" in text and "gpu02" not in text.split("took part")[0].split("|")[-1]


def test_skipped_steps_are_counted_by_anomaly_with_the_modality_that_they_share(
    tmp_path: Path,
) -> None:
    run = RecordedRun(tmp_path / "run")
    run.allocate()
    run.start(0)
    for anomaly, modalities in (
        ("gradient_spike", ("imu", "image")),
        ("loss_spike", ("imu",)),
        ("gradient_spike", ("imu", "fmri")),
    ):
        run.train(20)
        run.train_step(grad_norm=900.0, applied=False, loss=2.0)
        run.write_event(
            "step_skipped",
            step=run.step - 1,
            anomaly=anomaly,
            offending_samples=[{"sample": f"{m}/0@0", "modality": m} for m in modalities],
        )
    run.end("done", "63 steps")
    assert (
        "3 steps were skipped: a gradient spike (2), a loss spike (1), each time with offending "
        "samples of imu (the last: step 62)"
    ) in get_text(load_facts(run.directory, now=run.set_file_times()))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"data_wait_fraction": 0.4}, "waiting for data"),
        ({"padding_fraction": 0.3}, "padding"),
        ({"grad_norm": 9.0}, "clipped"),
        ({"mfu": 0.05}, "MFU is 5%"),
        ({"router_load": {"image": [0.5, 0.495, 0.005]}}, "expert 3 for image"),
    ],
    ids=["data", "padding", "clip", "mfu", "router"],
)
def test_findings_of_a_slow_or_sick_run(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.allocate()
    run.start(0)
    run.train(200, **fields)
    run.end("done", "200 steps")
    assert words in get_text(load_facts(run.directory, now=run.set_file_times()))


def test_an_out_of_memory_that_lowered_the_budgets_is_reported(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.allocate()
    run.start(0)
    change = {"llm_tokens": 6000, "encoder_tokens": 24000, "rank": 3, "ranks": 16}
    run.write_event("budget_lowered", step=7, **change)
    run.write_event("pack_budget", llm_tokens=6000, encoder_tokens=24000, lowered=1)
    run.train(200)
    run.end("done", "200 steps")
    facts = load_facts(run.directory, now=run.set_file_times())
    text = get_text(facts)
    assert "lowered the token budgets once, last in step 7 on rank 3: to 6000 (LLM)" in text
    assert [event["event"] for event in facts.incidents.other_events] == ["budget_lowered"]


def test_nothing_stands_out_in_a_healthy_run(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run", steps=2000, every=500)
    run.allocate()
    run.start(0)
    run.train(2000, every=500)
    run.end("done", "2000 steps")
    facts = load_facts(run.directory, now=run.set_file_times())
    assert get_text(facts) == "Nothing stands out."
    assert facts.account.goodput is not None and facts.account.goodput > 0.95


def test_checkpoints_that_do_not_fit_into_the_grace_period_are_counted(
    eventful_run: RunFacts,
) -> None:
    short = replace(eventful_run.incidents, grace_period=10.0)
    assert "took longer than the grace period of 10 s" in get_text(
        replace(eventful_run, incidents=short)
    )
    long = replace(eventful_run.incidents, grace_period=100.0)
    assert "grace period" not in get_text(replace(eventful_run, incidents=long))


def test_the_faults_of_the_last_preflight_are_repeated(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.allocate()
    faults = [
        {"state": "fail", "node": "gpu02", "what": "its clock is 40 s ahead", "do": ""},
        {"state": "warn", "node": "", "what": "x"},
    ]
    (run.directory / "preflight.json").write_text(json.dumps({"ok": False, "faults": faults}))
    assert "The last preflight found 1 fault: gpu02: its clock is 40 s ahead." in get_text(
        load_facts(run.directory, now=run.clock)
    )
