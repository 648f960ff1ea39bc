"""Shared by all tests: no network, and one thread a process, since processes share the cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Ranks that a test starts import helpers too; pytest itself has `pythonpath` in pyproject.toml.
HELPERS = str(Path(__file__).parent / "helpers")
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HELPERS, os.environ.get("PYTHONPATH")]))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A soak test is slow too, so `-m "not slow"` leaves it out."""
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker("slow")
