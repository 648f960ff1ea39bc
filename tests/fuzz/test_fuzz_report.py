"""Mutated records of a run: `onellm report` draws what can be read; nothing runs in its page."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import fuzz
from mutators import mutate_any, mutate_bytes, mutate_json, mutate_json_lines, mutate_lines
from recorded_runs import record_eventful_run

from onellm_dist.report.command import run_report

LINES = mutate_any(mutate_json_lines, mutate_json_lines, mutate_bytes)
FILES = {
    "metrics.jsonl": LINES,
    "events.jsonl": LINES,
    "attempts.jsonl": LINES,
    "validation.jsonl": LINES,
    "samples/skipped-rank00003.jsonl": LINES,
    "exit.json": mutate_any(mutate_json, mutate_bytes),
    "config.yaml": mutate_any(mutate_lines, mutate_bytes),
}
SCRIPTS = re.compile(r"<script[ >]")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of four starts, with every twentieth step."""
    found = record_eventful_run(tmp_path / "run").directory
    metrics = found / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[::20]))
    return found


def make_surface(run_dir: Path, name: str) -> Callable[[bytes], None]:
    whole = (run_dir / name).read_bytes()
    page = run_dir / "report.html"

    def draw() -> str:
        with contextlib.redirect_stdout(io.StringIO()):
            run_report(run_dir, None, as_json=True)
            run_report(run_dir, None, as_json=False)
        return page.read_text(encoding="utf-8")

    scripts = len(SCRIPTS.findall(draw()))

    def read(data: bytes) -> None:
        (run_dir / name).write_bytes(data)
        try:
            assert len(SCRIPTS.findall(draw())) == scripts, "a text of the run became a script"
        finally:
            (run_dir / name).write_bytes(whole)

    return read


def run_file(run_dir: Path, name: str, cases: int) -> None:
    seeds = [(run_dir / name).read_bytes()]
    fuzz(
        f"report {name}", make_surface(run_dir, name), seeds, FILES[name], cases=cases
    ).require_clean(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_mutated_records(run_dir: Path, name: str) -> None:
    run_file(run_dir, name, 30)


@pytest.mark.soak
@pytest.mark.parametrize("name", FILES)
def test_mutated_records_for_hours(run_dir: Path, name: str) -> None:
    run_file(run_dir, name, 1500)
