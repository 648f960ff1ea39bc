"""`onellm report`: the page, the summary on the terminal, and JSON for scripts."""

from __future__ import annotations

import fcntl
import json
import re
from pathlib import Path

import pytest
from recorded_runs import RecordedRun, load_eventful_run, record_eventful_run

from onellm_dist.common.errors import EXIT_DONE
from onellm_dist.report.command import run_report
from onellm_dist.report.facts import RunFacts, load_facts
from onellm_dist.report.findings.collect import collect_findings
from onellm_dist.report.page import build_page
from onellm_dist.report.summary import build_summary


@pytest.fixture(scope="module")
def eventful_run(tmp_path_factory: pytest.TempPathFactory) -> RunFacts:
    return load_eventful_run(tmp_path_factory)


def get_text(facts: RunFacts) -> str:
    return " | ".join(finding.text for finding in collect_findings(facts))


def test_the_page_contains_all_it_shows_and_needs_no_network(eventful_run: RunFacts) -> None:
    page = build_page(eventful_run, build_summary(eventful_run), collect_findings(eventful_run))
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "<script" not in page and "@import" not in page
    for heading in (
        "What to look at first",
        "Timeline",
        "Loss",
        "Where the time went",
        "Starts",
        "Start-up timing",
        "Stalls",
    ):
        assert f"<h2>{heading}" in page
    assert page.count("<svg") >= 9 and "Goodput is the share of the allocated time" in page
    assert "nan" not in re.sub(r"[a-z]nan|nan[a-z]", "", page.lower()), "no NaN reaches a drawing"
    assert page.count("<table") == page.count("</table>")
    assert page.count("<svg") == page.count("</svg>")


def test_a_running_run_is_recognised_by_its_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RecordedRun(tmp_path / "run", slurm=False)
    run.allocate()
    run.start(0)
    run.train(30)
    now = run.set_file_times()
    with (run.directory / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        facts = load_facts(run.directory, now=now + 5)
        assert facts.starts[-1].status == "running" and facts.starts[-1].end == now + 5
        assert build_summary(facts).eta_seconds == pytest.approx(170 * 2.0, rel=0.05)
        assert "may hang" not in get_text(facts)
        assert "may hang" in get_text(load_facts(run.directory, now=now + 3600)), (
            "locked, but nothing was written for an hour"
        )
        assert run_report(run.directory, None, as_json=False) == EXIT_DONE
    facts = load_facts(run.directory, now=now + 5)
    assert facts.starts[-1].status == "lost"
    assert facts.starts[-1].end == pytest.approx(now, abs=1)
    assert "without a record" in get_text(facts)
    assert (run.directory / "report.html").is_file()
    assert "30/200" in capsys.readouterr().out


def test_json_is_for_scripts_and_writes_no_page(
    eventful_run: RunFacts, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    directory = eventful_run.records.directory
    (directory / "report.html").unlink(missing_ok=True)
    assert run_report(directory, None, as_json=True) == EXIT_DONE
    report = json.loads(capsys.readouterr().out)
    assert report["start_count"] == 4 and report["lost_steps"] == 75 and len(report["starts"]) == 4
    assert not (directory / "report.html").exists()
    assert run_report(directory, tmp_path / "sub" / "r.html", as_json=True) == EXIT_DONE
    assert (tmp_path / "sub" / "r.html").is_file()


@pytest.mark.parametrize("name", ["exit.json", "config.yaml", "refusals.jsonl", "events.jsonl"])
@pytest.mark.seconds
def test_records_that_are_nested_too_deep_are_passed_over(name: str, tmp_path: Path) -> None:
    run = record_eventful_run(tmp_path / "run").directory
    (run / name).write_text("[" * 100_000)
    assert run_report(run, None, as_json=False) == EXIT_DONE
