"""Tests that need torchao, run with it.

It is not installed where the other tests run, because transformers and PEFT import it wherever they
find it, which slows every start. Here it lies in a folder of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pip_install import install

pytestmark = [pytest.mark.slow, pytest.mark.soak]
TESTS = Path(__file__).parents[2]
FILES = (
    "model/quantised/test_quantised.py",
    "model/quantised/test_quantised_recompute.py",
    "train/engine/test_quantised_base.py",
    "train/test_quantised_runs.py",
)


def test_what_needs_torchao_passes_with_it(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path)]
    install([*pip, "torchao==0.18.0"])
    found = [*filter(None, [os.environ.get("PYTHONPATH")]), str(TESTS.parent), str(tmp_path)]
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--timeout", "5000", "-p", "no:cacheprovider", *FILES],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(found)},
        capture_output=True,
        text=True,
        timeout=6000,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-6000:]
    assert " skipped" not in ran.stdout and " passed" in ran.stdout, ran.stdout[-2000:]
