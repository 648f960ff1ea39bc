"""A rehearsed run against the undisturbed one: what counts as the same, and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onellm_dist.testing.slurm_cluster.comparison import compare_runs
from onellm_dist.testing.slurm_cluster.rehearse import ScenarioResult, format_table
from onellm_dist.testing.slurm_cluster.scenarios import Recovery

STEPS = 4


def write_run(
    run: Path,
    *,
    digest: str = "d2",
    gap: float = 0.0,
    drop: int | None = None,
    twice: int | None = None,
) -> Path:
    """A run of four steps; `drop` and `twice` are steps, `digest` and `gap` change step 2."""
    lines: list[dict[str, Any]] = [
        {"step": s, "sample_digest": f"d{s}", "loss": 2.0 - s / 10} for s in range(STEPS)
    ]
    lines[2]["sample_digest"] = digest
    lines[2]["loss"] = 1.8 + gap
    if drop is not None:
        del lines[drop]
    if twice is not None:
        lines.insert(twice, lines[twice])
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9'
    )
    return run


@pytest.mark.parametrize(
    ("changed", "samples", "losses"),
    [
        ({}, True, True),
        ({"gap": 9e-5}, True, True),
        ({"gap": 1.1e-4}, True, False),
        ({"digest": "other"}, False, False),
        ({"drop": 1}, False, False),
        ({"drop": 3}, False, False),
        ({"twice": 2}, False, False),
    ],
    ids=["same", "rounding", "loss", "digest", "hole", "short", "twice"],
)
def test_same_samples_and_same_losses(
    tmp_path: Path, changed: dict[str, Any], samples: bool, losses: bool
) -> None:
    found = compare_runs(write_run(tmp_path / "run", **changed), write_run(tmp_path / "clean"))
    assert (found.same_samples, found.same_losses) == (samples, losses)
    row = ScenarioResult("preemption", Recovery("preempted", (2, 1), 12.3, 0), found, 40.0)
    assert row.passed == (samples and losses)
    clean = ScenarioResult(
        "clean run",
        Recovery("done", (2,), None, 0),
        compare_runs(tmp_path / "clean", tmp_path / "clean"),
        9.0,
    )
    text = format_table([clean, row], ["loss of a node"]).splitlines()
    assert ("DIFFER" in text[2]) != row.passed and "12.3 s" in text[2] and "2 -> 1" in text[2]
    assert "reference" in text[1] and "FAILED" in text[3]


def test_a_run_without_steps_is_never_the_same(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert not compare_runs(tmp_path / "empty", write_run(tmp_path / "clean")).same_losses
    assert not compare_runs(tmp_path / "empty", tmp_path / "empty").same_losses
