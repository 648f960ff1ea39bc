"""The starts of a run: their reasons, nodes, steps, lost steps and start-up timing."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded_runs import STARTUP_SECONDS, RecordedRun, load_eventful_run

from onellm_dist.report.facts import RunFacts, load_facts
from onellm_dist.report.findings.collect import collect_findings
from onellm_dist.report.page import build_page
from onellm_dist.report.summary import build_summary
from onellm_dist.train.records.json_lines import drop_lines_from


@pytest.fixture(scope="module")
def eventful_run(tmp_path_factory: pytest.TempPathFactory) -> RunFacts:
    return load_eventful_run(tmp_path_factory)


def test_every_start_has_its_reason_nodes_and_lost_steps(eventful_run: RunFacts) -> None:
    starts = [
        (s.status, s.nodes, s.world_size, s.first_step, s.steps_done, s.lost_steps)
        for s in eventful_run.starts
    ]
    assert starts == [
        ("preempted", 2, 16, 0, 330, 0),
        ("lost", 2, 16, 330, 553, 53),
        ("failed", 1, 8, 500, 622, 22),
        ("done", 2, 16, 600, 1000, 0),
    ]
    failed = eventful_run.starts[2]
    assert "illegal memory access" in failed.reason
    assert failed.offending_samples == ["laion/00031.tar/000310099@0"]
    assert [len(s.steps) for s in eventful_run.starts] == [330, 170, 100, 400], (
        "each retained step belongs to the start that did it last"
    )


def test_startup_timing_has_the_wait_for_nodes_and_every_part(eventful_run: RunFacts) -> None:
    seconds = eventful_run.starts[1].startup_seconds
    assert seconds["scheduler"] == pytest.approx(900, abs=1)
    assert seconds["job"] == pytest.approx(5, abs=1.5)
    assert seconds["imports"] == STARTUP_SECONDS["imports"]
    assert seconds["first_step"] == pytest.approx(2, rel=0.1)
    assert "scheduler" not in eventful_run.starts[0].startup_seconds
    assert build_summary(eventful_run).resume_seconds == pytest.approx(349, abs=3)


@pytest.mark.parametrize(
    ("recorded", "ranks"),
    [({"ranks": 4}, 4), ({}, 16)],
    ids=["ranks-recorded", "ranks-of-another-start"],
)
def test_a_run_of_one_step_and_a_start_that_never_trained(
    tmp_path: Path, recorded: dict[str, int], ranks: int
) -> None:
    run = RecordedRun(tmp_path / "run", steps=1)
    run.allocate()
    run.attempt |= recorded
    run.end("usage", "no dataset at /nowhere")
    (run.directory / "events.jsonl").unlink()  # it failed before events were recorded
    run.allocate(queue=10)
    run.start(0)
    run.train(1)
    run.end("done", "1 step")
    facts = load_facts(run.directory, now=run.set_file_times())
    assert [(s.status, s.first_step, s.world_size) for s in facts.starts] == [
        ("usage", None, ranks),
        ("done", 0, 16),
    ]
    assert facts.account.parts["start_up"] > 0 and 0 < (facts.account.goodput or 0) < 1
    build_page(facts, build_summary(facts), collect_findings(facts))


def test_starts_without_timing_or_lost_steps_are_estimated(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run", slurm=False)
    run.allocate()
    run.start(0, timed=False)
    run.train(70)
    run.allocate(queue=40)
    run.start(50, timed=False)
    run.train(150)
    run.end("done", "200 steps")
    facts = load_facts(run.directory, now=run.set_file_times())
    assert [(s.status, s.first_step, s.steps_done) for s in facts.starts] == [
        ("lost", 0, 50),
        ("done", 50, 200),
    ]
    assert facts.account.estimated and not facts.starts[1].startup_seconds
    page = build_page(facts, build_summary(facts), collect_findings(facts))
    assert "recorded no start-up timing" in page


def test_steps_that_a_kill_lost_are_there_before_the_run_is_started_again(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run", slurm=False)
    run.allocate()
    run.start(0)
    run.train(51, every=45)
    later = run.set_file_times() + 24 * 3600  # nothing was written for a day
    facts = load_facts(run.directory, now=later)
    (start,) = facts.starts
    assert (start.status, start.lost_steps, len(start.steps)) == ("lost", 6, 45)
    assert start.lost_seconds > 0
    assert build_summary(facts).lost_steps == 6


def test_steps_repeated_within_a_start_are_lost(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.allocate()
    run.start(0)
    run.train(60)
    run.write_event("rollback", step=60, to=50, reason="loss spike")
    run.step = 50
    run.train(150)
    run.end("done", "200 steps")
    facts = load_facts(run.directory, now=run.set_file_times())
    assert facts.starts[0].lost_steps == 10 and len(facts.records.steps) == 200
    assert [e["event"] for e in facts.incidents.other_events] == ["rollback"]
    assert "rollback" in build_page(facts, build_summary(facts), collect_findings(facts))


def test_a_rollback_whose_lines_are_gone_is_counted_by_its_event(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.allocate()
    run.start(0)
    run.train(70, every=1000)
    drop_lines_from(run.directory / "metrics.jsonl", 50)
    run.step = 50
    run.write_event("rollback", step=69, to=50, lost_steps=20, reason="loss 9.1")
    run.train(10, every=1000)
    run.write_event(
        "checkpoint", steps_done=60, folder="step-00000060", seconds=30.0, stall_seconds=0.5
    )
    run.end(
        "failed",
        "hang: no progress for 900 s in step 60",
        failed_step=60,
        responsible_host="gpu02",
    )
    facts = load_facts(run.directory, now=run.set_file_times())
    (start,) = facts.starts
    assert start.lost_steps == 20 and start.lost_seconds == pytest.approx(40, rel=0.05)
    assert not start.lost_known
    assert facts.account.parts["checkpoints"] == 0.5 * 16, (
        "what is written in the background pauses nobody"
    )
    texts = [finding.text for finding in collect_findings(facts)]
    assert any("attributes 1 hang to a rank on gpu02" in text for text in texts)
