"""What `onellm train` does around the local ranks that it starts."""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path

import pytest

from onellm_dist.common.errors import RunInUseError, UsageError
from onellm_dist.common.logging import configure_logging
from onellm_dist.common.refusals import read_refusals
from onellm_dist.common.run_files import CONFIG, EXIT, LOGS, REFUSALS
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


REFUSED: dict[str, tuple[list[str], str]] = {
    "wrong value": (["train.steps=0"], "train.steps"),
    "unknown key": (["train.stepz=1"], "unknown key train.stepz"),
    "no model": (["model.path=/no/such/model"], "model.path=/no/such/model: no such folder"),
    "no dataset": (["data.mixture=[{path: no_such_dataset}]"], "no_such_dataset"),
    "no list": (["data.exclude=/no/such/list"], "data.exclude=/no/such/list"),
    "no checkpoint": (["checkpoint.resume=/no/such/step"], "checkpoint.resume=/no/such/step"),
    "no DeepSpeed JSON": (["engine.config=/no/such.json"], "/no/such.json"),
    "damaged DeepSpeed JSON": (["engine.config={folder}/cut.json"], "cut.json"),
    "DeepSpeed JSON of another use": (["engine.config={folder}/batch.json"], "batch.json"),
    "optimizer": (["optim.name=no_such"], "optim.name=no_such"),
    "callback": (["train.callbacks=[no_such_module:Class]"], "no_such_module"),
    "in use": ([], "in use by another start"),
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_start_changes_nothing_but_the_log_of_refusals(
    recipe: Path, name: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides, says = REFUSED[name]
    (recipe.parent / "cut.json").write_text('{"zero_optimization": {')
    (recipe.parent / "batch.json").write_text('{"train_batch_size": "auto"}')
    run_dir = recipe.parent / "run"
    for path in (CONFIG, EXIT, LOGS + "/rank-1.log", "events.jsonl", "checkpoints/step-00000001/x"):
        (run_dir / path).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / path).write_text("{}\n")
    lock_directory(run_dir).close()
    before = digest(run_dir)
    given = [item.replace("{folder}", str(recipe.parent)) for item in overrides]
    if name != "in use":
        with pytest.raises(UsageError, match=re.escape(says)):
            run.main(recipe, [*given, f"launch.ranks={ranks}"])
    elif ranks == 2:
        with lock_directory(run_dir), pytest.raises(RunInUseError, match=says):
            run.main(recipe)
    else:
        return  # that rank is this process: tests/train/test_refusals.py
    assert digest(run_dir) == before
    (line,) = read_refusals(run_dir)
    assert says in line["reason"]


def digest(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of everything below a folder, but the log of refusals."""
    return {
        str(path.relative_to(folder)): (
            path.read_bytes() if path.is_file() else b"",
            path.stat().st_mtime_ns,
        )
        for path in folder.rglob("*")
        if path.name != REFUSALS
    }


def test_the_refusal_of_another_start_does_not_hide_that_the_ranks_failed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two starts at once: one is refused, while the ranks of the other are killed."""
    run_dir = recipe.parent / "run"
    log = run_dir / REFUSALS
    code = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "print('said before the end', flush=True)\n"
        f"while not Path({str(log)!r}).exists(): time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    monkeypatch.setattr(run, "make_module_command", lambda *_: [sys.executable, "-c", code])

    def start_another() -> None:
        with pytest.raises(UsageError, match=r"train\.steps"):
            run.main(recipe, ["train.steps=0"])

    other = threading.Timer(1.0, start_another)
    other.start()
    assert run.main(recipe) == 1
    other.join()
    (line,) = read_refusals(run_dir)
    assert "train.steps" in line["reason"]
    found = json.loads((run_dir / EXIT).read_text())
    assert found["status"] == "failed" and "before it could say why" in found["reason"]
    assert (run_dir / LOGS / "rank-1.log").read_text() == "said before the end\n"


def test_a_start_that_its_own_ranks_refuse_leaves_no_logs(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = recipe.parent / "run"
    run_dir.mkdir()
    (run_dir / CONFIG).write_text("{}\n")
    code = (
        "import os, sys; from pathlib import Path\n"
        "from onellm_dist.common.errors import UsageError\n"
        "from onellm_dist.common.refusals import describe_start\n"
        "from onellm_dist.train.records.exit_file import ExitFile\n"
        "rank = int(os.environ['RANK'])\n"
        "print('rank', rank, 'speaks', flush=True)\n"
        "start = describe_start('127.0.0.1', int(os.environ['MASTER_PORT']), os.environ)\n"
        f"exit_file = ExitFile(Path({str(run_dir)!r}), rank=rank, start=start)\n"
        "sys.exit(exit_file.write_failure(UsageError('refused here')) if rank else 0)"
    )
    monkeypatch.setattr(run, "make_module_command", lambda *_: [sys.executable, "-c", code])
    assert run.main(recipe) == 2
    names = {path.name for path in run_dir.iterdir()}
    assert names == {CONFIG, REFUSALS, ".lock"}
    assert "rank 1 speaks" in capfd.readouterr().err, "the only copy is shown"


MOVES = """
import os, sys, threading, time
from onellm_dist.launch.rank_logs import move_own_log
print("before", flush=True)
os.system("echo child before")
move_own_log()
print("after", flush=True)
os.system("echo child after; echo error >&2")
sys.exit(int(os.environ["RANK"]))
"""


def test_the_output_of_a_rank_moves_to_the_run_when_its_start_has_begun(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    earlier = recipe.parent / "run" / LOGS / "rank-1.log"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("of an earlier start\n")
    configure_logging()
    monkeypatch.setattr(run, "make_module_command", lambda *_: [sys.executable, "-c", MOVES])
    assert run.main(recipe) == 1
    lines = ["before", "child before", "after", "child after", "error"]
    assert earlier.read_text().splitlines() == lines
    assert "\n".join(lines) in capfd.readouterr().err, "the launcher reads it there"


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
