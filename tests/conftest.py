"""Shared by all tests: no network, and one thread a process, since processes share the cores."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from forked_python import open_folder
from hypothesis import settings

gc.disable()  # until pytest_collection ends
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ranks that a test starts import helpers too; pytest itself has `pythonpath` in pyproject.toml.
HELPERS = str(Path(__file__).parent / "helpers")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HELPERS, os.environ.get("PYTHONPATH")]))

# Under nohup, processes that a test starts would ignore the signal too; a handler is not inherited.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)

# The same examples in every run; `make soak` draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("random", max_examples=400, print_blob=True, deadline=None)
settings.load_profile(os.environ.get("ONELLM_HYPOTHESIS", "repeatable"))

TESTS = Path(__file__).parent
LONGEST = (
    "docs/test_pages.py",
    "testing/slurm_cluster/test_rehearsal.py",
    "train/test_runs.py",
    "train/engine/test_engine_matrix.py",
    "testing/slurm_cluster/test_crash_loop.py",
    "train/engine/test_engine_memory.py",
    "train/test_refusals.py",
    "train/engine/test_float8_base.py",
    "evaluation/test_evaluate_group.py",
    "train/engine/test_preference_matrix.py",
    "shards/build/test_shard_crash.py",
    "model/test_compiled_engine.py",
    "planner/test_fake_ranks.py",
    "train/engine/test_engine.py",
    "planner/test_search.py",
    "planner/test_traffic.py",
    "train/start/test_pack_budget.py",
    "cli/test_cli.py",
    "train/test_survival.py",
    "train/test_faults_survived.py",
    "train/test_tuning_runs.py",
    "serving/server/test_server_parts.py",
    "evaluation/test_evaluate.py",
    "planner/test_plan_command.py",
    "planner/test_cost_model.py",
    "train/test_elastic.py",
    "testing/demo/test_toy_towers.py",
    "train/test_bad_steps.py",
    "planner/test_preference_plan.py",
    "train/test_handover.py",
    "train/test_several_spans.py",
    "convert/test_conversion_memory.py",
    "shards/build/test_shard_poison.py",
    "evaluation/test_benchmarks.py",
    "train/test_preference_runs.py",
    "serving/server/test_serve_adapters.py",
    "planner/test_calibrate.py",
    "common/workers/test_worker_pool.py",
    "train/engine/test_engine_runs.py",
    "convert/test_publish.py",
)
"""Files that take longest, the longest first: one that starts last would run alone at the end."""


def pytest_configure(config: pytest.Config) -> None:
    """All test processes of a run share the programs of forked_python.py."""
    if not hasattr(config, "workerinput"):
        config.add_cleanup(open_folder())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A soak test is slow too, so `-m "not slow"` leaves it out. The longest files come first."""
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker("slow")
    places = {TESTS / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """The lines that imports run are measured by one of the processes that run tests."""
    worker = getattr(session.config, "workerinput", {"workerid": "gw0"})["workerid"]
    try:
        with pause_coverage(session.config, worker != "gw0"):
            return (yield)
    finally:
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported and collected stays: no collection of garbage walks through it, ever."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 50)


@contextlib.contextmanager
def pause_coverage(config: pytest.Config, wanted: bool) -> Iterator[None]:
    """Measure nothing within the context, if coverage is measured at all."""
    plugin = config.pluginmanager.get_plugin("_cov")
    coverage = getattr(plugin, "cov_controller", None)
    if coverage is None or not wanted:
        yield
        return
    coverage.pause()
    try:
        yield
    finally:
        coverage.resume()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """The coverage report is that of the fast tests: measuring doubles the time of pure Python.

    Most slow tests start other processes, which are not measured anyway.
    """
    left_out = any(map(item.get_closest_marker, ("slow", "seconds", "unmeasured")))
    with pause_coverage(item.config, left_out):
        return (yield)
