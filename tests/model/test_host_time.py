"""The benchmark of host time runs: on fewer layers, without an engine."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "host_time.py"


@pytest.fixture
def benchmark() -> dict[str, Any]:
    found = runpy.run_path(str(BENCHMARK))
    found["measure"].__globals__.update(ROUNDS=1)
    found["LAYERS"].update(encoder=2, expert=1, llm=2)
    return found


@pytest.mark.slow
def test_fewer_operations_are_called_than_before(
    benchmark: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = (
        benchmark["summarise"]([benchmark["measure"]("plain", changed=changed, folder=tmp_path)])
        for changed in (False, True)
    )
    assert 500 < after["calls"] < before["calls"] < 10_000
    for found in (before, after):
        assert min(found["forward_ms"], found["backward_ms"], found["clouds_ms"]) > 0
    slow = {**after, "calls": before["calls"], "clouds_ms": 1.0}
    assert benchmark["report"]({"plain": {"before": before, "after": slow}}) == 1
    assert "MISSED: calls, plain: empty clouds" in capsys.readouterr().out.replace(
        "plain: time, ", ""
    )
