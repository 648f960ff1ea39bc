"""What `onellm train` does around the local ranks that it starts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from onellm_dist.common.errors import RunInUseError
from onellm_dist.common.refusals import read_refusals
from onellm_dist.common.run_files import CONFIG, EXIT, LOGS
from onellm_dist.shards.format.writer import DatasetWriter
from onellm_dist.train import run
from onellm_dist.train.records.run_directory import lock_directory


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe for two local ranks; its `run.dir` is `run` beside it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(run, "restrict_new_files", lambda: None)  # the umask of the tests stays
    monkeypatch.setattr("onellm_dist.train.records.run_directory.LOCK_PATIENCE_S", 0.1)
    with DatasetWriter(tmp_path / "texts", name="texts", modalities=()) as writer:
        writer.add("train", "only", {"txt": b"a caption"})
    data = {"root": str(tmp_path), "mixture": [{"path": "texts"}], "global_batch": 2}
    sections = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"preset": "toy"},
        "data": data,
        "train": {"stage": "align", "steps": 1},
        "optim": {"lr": 1.0},
        "launch": {"ranks": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(sections))
    return path


def test_a_refused_second_start_leaves_the_logs_of_the_running_one(recipe: Path) -> None:
    run_dir = recipe.parent / "run"
    held = lock_directory(run_dir)
    log = run_dir / LOGS / "rank-1.log"
    log.parent.mkdir()
    log.write_text("what the running start says\n")
    (run_dir / CONFIG).write_text("{}\n")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with held, pytest.raises(RunInUseError, match="in use by another start"):
        run.main(recipe)
    (line,) = read_refusals(run_dir)
    assert (line["status"], line["exit_code"]) == ("failed", 1)
    assert "in use by another start" in line["reason"]
    assert {path: path.read_bytes() for path in before} == before
    assert not (run_dir / EXIT).exists()


WRITES = 'open({path!r}, \'w\').write(\'{{"status": "failed", "reason": "own words"}}\')'


@pytest.mark.parametrize("earlier", ["done", None])
@pytest.mark.parametrize(
    ("rank", "reason"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "before it could say why"),
        ("import sys; {write}; sys.exit(1)", "own words"),
        ("import sys; sys.exit(0)", None),
    ],
    ids=["killed", "failed", "done"],
)
def test_ranks_that_are_killed_early_do_not_leave_the_earlier_end(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: str,
    reason: str | None,
    earlier: str | None,
) -> None:
    run_dir = recipe.parent / "run"
    run_dir.mkdir()
    if earlier:
        (run_dir / EXIT).write_text(json.dumps({"status": earlier, "reason": "all steps"}))
    code = rank.replace("{write}", WRITES.format(path=str(run_dir / EXIT)))
    monkeypatch.setattr(run, "make_module_command", lambda *_: [sys.executable, "-c", code])
    assert run.main(recipe) == (0 if reason is None else 1)
    if reason is None:
        assert (run_dir / EXIT).exists() == bool(earlier)
        return
    found = json.loads((run_dir / EXIT).read_text())
    assert found["status"] == "failed" and reason in found["reason"]
