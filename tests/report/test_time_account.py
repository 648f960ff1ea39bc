"""Where the allocated time went, and the goodput."""

from __future__ import annotations

from pathlib import Path

import pytest
from recorded_runs import RecordedRun, load_eventful_run

from onellm_dist.report.facts import RunFacts, load_facts
from onellm_dist.report.findings.collect import collect_findings
from onellm_dist.report.time_account import PARTS


@pytest.fixture(scope="module")
def eventful_run(tmp_path_factory: pytest.TempPathFactory) -> RunFacts:
    return load_eventful_run(tmp_path_factory)


def test_goodput_is_the_time_of_retained_steps_over_the_allocated_time(
    eventful_run: RunFacts,
) -> None:
    account = eventful_run.account
    starts = eventful_run.starts
    retained = sum(
        line["seconds"] * s.world_size for s in starts for line in s.steps if line["applied"]
    )
    assert account.goodput == pytest.approx(retained / account.allocated)
    assert account.allocated == pytest.approx(
        sum(s.seconds * s.world_size for s in starts), rel=1e-3
    ), "the parts sum to the time for which nodes were held"
    assert account.parts["lost"] == pytest.approx(53 * 2.0 * 16 + 22 * 2.0 * 8, rel=0.05)
    assert account.parts["skipped"] == pytest.approx(2.0 * 8, rel=0.05)
    assert account.parts["checkpoints"] == pytest.approx(
        (3 * 3 + 4) * 16 + 2 * 3 * 16 + 3 * 8 + 22 * 16 + 4 * 3 * 16, rel=0.2
    )
    assert account.parts["validation"] == pytest.approx(3 * 10 * 16)
    assert set(account.parts) == set(PARTS)


def test_the_time_for_which_a_hang_holds_its_nodes_is_a_part_of_its_own(tmp_path: Path) -> None:
    run = RecordedRun(tmp_path / "run")
    run.allocate()
    run.start(0)
    run.train(50)
    run.clock += 900
    run.end("failed", "hang: no progress for 900 s in step 50", failed_step=50)
    facts = load_facts(run.directory, now=run.set_file_times())
    assert facts.account.parts["failed"] == pytest.approx(902 * 16, rel=0.01)
    assert facts.account.parts["other"] == 0
    texts = [finding.text for finding in collect_findings(facts)]
    assert any("held by a failed start" in text for text in texts)
