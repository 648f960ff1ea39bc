"""A rehearsed run against the undisturbed one: what counts as the same, and the table that says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onellm_dist.testing.slurm_cluster.history import compare
from onellm_dist.testing.slurm_cluster.rehearse import Row, table
from onellm_dist.testing.slurm_cluster.scenarios import Interrupted

STEPS = 4


def write(run: Path, **changed: object) -> Path:
    """A run of four steps; `drop` and `twice` are steps, `digest` and `gap` change step 2."""
    lines = [{"step": s, "sample_digest": f"d{s}", "loss": 2.0 - s / 10} for s in range(STEPS)]
    lines[2]["sample_digest"] = changed.get("digest", "d2")
    lines[2]["loss"] = 1.8 + float(changed.get("gap", 0.0))  # type: ignore[arg-type]
    if "drop" in changed:
        del lines[int(changed["drop"])]  # type: ignore[call-overload]
    if "twice" in changed:
        lines.insert(int(changed["twice"]), lines[int(changed["twice"])])  # type: ignore[call-overload]
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9'
    )
    return run


@pytest.mark.parametrize(
    ("changed", "stream", "losses"),
    [
        ({}, True, True),
        ({"gap": 9e-5}, True, True),
        ({"gap": 1.1e-4}, True, False),
        ({"digest": "other"}, False, False),
        ({"drop": 1}, False, False),
        ({"drop": 3}, False, False),
        ({"twice": 2}, False, False),
    ],
    ids=["same", "rounding", "loss", "samples", "hole", "short", "twice"],
)
def test_what_counts_as_the_same(
    tmp_path: Path, changed: dict[str, object], stream: bool, losses: bool
) -> None:
    found = compare(write(tmp_path / "run", **changed), write(tmp_path / "clean"))
    assert (found.stream, found.losses) == (stream, losses)
    row = Row("preemption", Interrupted("preempted", (2, 1), 12.3, 0), found, 40.0)
    assert row.passed == (stream and losses)
    clean = Row(
        "clean run",
        Interrupted("done", (2,), None, 0),
        compare(tmp_path / "clean", tmp_path / "clean"),
        9.0,
    )
    text = table([clean, row], ["loss of a node"]).splitlines()
    assert ("DIFFER" in text[2]) != row.passed and "12.3 s" in text[2] and "2 -> 1" in text[2]
    assert "reference" in text[1] and "FAILED" in text[3]


def test_a_run_without_steps_is_never_the_same(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert not compare(tmp_path / "empty", write(tmp_path / "clean")).losses
    assert not compare(tmp_path / "empty", tmp_path / "empty").losses
