"""Tasks that one span cannot solve and several can, trained and tested for real."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def main() -> Any:
    """`main` of `benchmarks/spans.py`: 0 if several spans are above one and above the control."""
    path = Path(__file__).parents[2] / "benchmarks" / "spans.py"
    return runpy.run_path(str(path), run_name="spans_benchmark")["main"]


@pytest.mark.slow
def test_two_pictures_are_compared_and_one_is_not(
    main: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--tasks", "pair", "--span-positions", "learned", "--steps", "30", "--held-out", "80"]
    assert main(given) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| pair")]
    assert [line.split(" | ")[1] for line in table[-2:]] == ["1", "2"]


@pytest.mark.soak
@pytest.mark.parametrize("positions", ["none", "fixed", "learned"])
@pytest.mark.parametrize("task", ["picture", "sound"])
def test_what_only_a_tile_or_a_later_window_shows(main: Any, task: str, positions: str) -> None:
    assert main(["--tasks", task, "--span-positions", positions]) == 0
