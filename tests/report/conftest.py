"""A run with a history, recorded once for the tests that only read it."""

from __future__ import annotations

import pytest
from recorded_runs import record_eventful_run

from onellm_dist.report.facts import RunFacts, load_facts


@pytest.fixture(scope="session")
def eventful_run(tmp_path_factory: pytest.TempPathFactory) -> RunFacts:
    run = record_eventful_run(tmp_path_factory.mktemp("recorded") / "run")
    return load_facts(run.directory, now=run.set_file_times())
