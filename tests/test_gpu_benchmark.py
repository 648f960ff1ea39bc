"""`benchmarks/gpu/` at toy size on a CPU: the same scripts, sections and files as on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu" / "measure_gpu.py"


def start(out: Path, *options: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, str(SCRIPT), "--tiny", "--out", str(out), *options]
    return subprocess.Popen(command, env=env)


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "figures.json").read_text())
    return found


@pytest.mark.slow
def test_what_was_measured_outlives_a_kill(tmp_path: Path) -> None:
    process = start(tmp_path, "--only", "ceilings", "kernels", "--budget", "300")
    until = time.monotonic() + 300
    while not (tmp_path / "page.html").exists() and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.2)
    process.kill()
    process.wait()
    card = read(tmp_path)["card"]
    assert "flash_attention_for_cpu" in card["attention that ran, width 64"]
    assert card["fused swiglu"] == "torch, as written"
    assert "attention that ran" in (tmp_path / "page.html").read_text()


@pytest.mark.soak
def test_every_section_runs_and_is_compared_with_the_plan(tmp_path: Path) -> None:
    process = start(tmp_path, "--budget", "900")
    assert process.wait(900) == 0
    found = read(tmp_path)
    assert not [name for name in found if name.startswith("failed")]
    assert found["stage I"]["samples_per_s"] > 0
    assert {"encoder", "upm", "llm"} <= set(
        found["kernels by part (forward; backward is `outside`), ms"]
    )
    assert sum(name.startswith("engine ") for name in found) == 5
    assert sum(name.startswith("with: ") for name in found) == 4
    for name in ("stage I", "stage II", "tune, recompute selective"):
        beside = found[f"predicted and measured: {name}"]
        assert beside["samples_per_s_predicted"] > 0 and beside["peak_gib_predicted"] > 0


@pytest.mark.soak
def test_sections_without_time_are_left_out(tmp_path: Path) -> None:
    process = start(tmp_path, "--budget", "1")
    assert process.wait(300) == 0
    assert set(read(tmp_path)) <= {"done", "card", "matrix products, TFLOP/s", "copy"}
