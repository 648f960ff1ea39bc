"""Run directories whose files are incomplete, broken or missing are read as far as they go."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import RecordedRun, record_eventful_run

from onellm_dist.common.errors import UsageError
from onellm_dist.report.facts import load_facts
from onellm_dist.report.findings.collect import collect_findings
from onellm_dist.report.page import build_page
from onellm_dist.report.records import read_records
from onellm_dist.report.summary import build_summary, summary_to_json, summary_to_text


def test_lines_that_a_kill_or_a_failing_disk_broke_are_ignored_and_counted(tmp_path: Path) -> None:
    run = record_eventful_run(tmp_path / "run")
    complete = load_facts(run.directory, now=run.clock)
    with (run.directory / "metrics.jsonl").open("ab") as out:
        out.write(b'{"step": 1000, "loss": 1.')
    with (run.directory / "events.jsonl").open("ab") as out:
        out.write(b'\x00\x00\xff\xfe\n[1, 2]\n{"event"')
    (run.directory / "attempts.jsonl").write_text("half a li")
    (run.directory / "exit.json").write_text("{")
    (run.directory / "config.yaml").write_text("a: [")
    facts = load_facts(run.directory, now=run.clock)
    assert len(facts.records.steps) == len(complete.records.steps)
    assert facts.records.broken_lines == {
        "metrics.jsonl": 1,
        "events.jsonl": 3,
        "attempts.jsonl": 1,
    }
    assert [s.lost_steps for s in facts.starts] == [0, 53, 22, 0], (
        "the events alone have the starts"
    )
    findings = collect_findings(facts)
    assert any("cannot be read" in finding.text for finding in findings)
    assert "<h2>Starts" in build_page(facts, build_summary(facts), findings)


VALUES: tuple[Any, ...] = (
    None,
    "x",
    -1,
    1e300,
    [],
    {},
    [1, {"a": 2}],
    True,
    "2026-11-20T09:14:15+0000",
    0,
    float("nan"),
    "123",
    1.5,
)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.seconds
def test_lines_with_any_values_do_not_keep_the_page_from_being_written(
    seed: int, tmp_path: Path
) -> None:
    run = record_eventful_run(tmp_path / "run")
    draw = random.Random(seed)
    texts = {path: path.read_text() for path in run.directory.rglob("*.json*") if path.is_file()}
    for _ in range(8):
        for path, text in texts.items():
            lines = text.splitlines()
            for i in draw.sample(range(len(lines)), min(4, len(lines))):
                entry = json.loads(lines[i])
                entry[draw.choice(list(entry))] = draw.choice(VALUES)
                entry.pop(draw.choice(list(entry)))
                lines[i] = json.dumps(entry)
            path.write_text("\n".join(lines) + "\n")
        facts = load_facts(run.directory, now=run.clock)
        summary = build_summary(facts)
        findings = collect_findings(facts)
        assert "</html>" in build_page(facts, summary, findings)
        assert summary_to_text(facts, summary, findings)
        json.dumps(summary_to_json(facts, summary, findings))


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "events.jsonl", "config.yaml", "attempts.jsonl", "exit.json"]
)
def test_one_file_alone_is_enough_for_a_page(name: str, tmp_path: Path) -> None:
    run = record_eventful_run(tmp_path / "run")
    for path in run.directory.iterdir():
        if path.is_file() and path.name != name:
            path.unlink()
    facts = load_facts(run.directory, now=run.clock)
    summary = build_summary(facts)
    findings = collect_findings(facts)
    assert "What to look at first" in build_page(facts, summary, findings)
    json.dumps(summary_to_json(facts, summary, findings), allow_nan=False)
    assert summary_to_text(facts, summary, findings)


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run directory"):
        read_records(tmp_path)


def test_steps_repeated_within_a_start_are_overwritten_lines(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.allocate()
    run.start(0)
    run.train(60)
    run.step = 50
    run.train(20)
    records = read_records(run.directory, now=run.clock)
    assert [line["step"] for line in records.steps] == list(range(70))
    assert sorted(line["step"] for line in records.overwritten) == list(range(50, 60))
