"""What a start goes on with: `checkpoint.resume` obeyed once a job, another run's ledger, torn lines, a checkpoint to come back to."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_model import pack, sample

from onellm_dist.common.files import repair_last_line
from onellm_dist.common.run_files import CHECKPOINT_MANIFEST
from onellm_dist.config.schema import RunConfig
from onellm_dist.launch.slurm.attempts import append_attempt, make_attempt
from onellm_dist.train.checkpoint.folder import make_checkpoint_name
from onellm_dist.train.checkpoint.inherit import apply_resume, inherit_samples
from onellm_dist.train.checkpoint.resume import find_checkpoint
from onellm_dist.train.records.applied_resumes import note_obeyed, was_obeyed
from onellm_dist.train.records.run_directory import CHECKPOINTS, LEDGER, prepare_directory
from onellm_dist.train.records.skipped_samples import MARKS, STARTS, Ledger
from onellm_dist.train.stability.rollback import Marks, needs_a_start

ALONE: Any = SimpleNamespace(
    rank=0,
    world_size=1,
    is_rank_zero=True,
    gather=lambda value: [value],
    broadcast=lambda value: value,
    barrier=lambda: None,
)


def checkpoint(run_dir: Path, step: int) -> Path:
    folder = run_dir / CHECKPOINTS / make_checkpoint_name(step)
    folder.mkdir(parents=True)
    (folder / CHECKPOINT_MANIFEST).write_text(
        json.dumps({"version": 2, "step": step, "files": {}, "sha256": {}})
    )
    return folder


def config(run_dir: Path, resume: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": str(run_dir)},
            "model": {"preset": "toy"},
            "data": {"mixture": [{"path": "image"}], "global_batch": 1},
            "train": {"stage": "align", "steps": 1},
            "optim": {"lr": 1.0},
            "checkpoint": {"resume": resume},
        }
    )


def start(own: RunConfig) -> Path | None:
    """What rank 0 of a start does with its directory; the checkpoint it goes on from."""
    found = find_checkpoint(own, own.run.dir / CHECKPOINTS, ALONE)
    prepare_directory(own, found.folder)
    apply_resume(own, found)
    return found.folder


def slurm(monkeypatch: pytest.MonkeyPatch, job: str, restarts: int = 0) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def test_a_requeued_job_goes_on_although_its_command_line_says_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = config(tmp_path, "never")
    checkpoint(tmp_path, 9)
    slurm(monkeypatch, "12")
    assert start(own) is None and len(list(tmp_path.glob("before-*/*/step-*"))) == 1
    saved = checkpoint(tmp_path, 3)
    slurm(monkeypatch, "12", 1)
    assert start(own) == saved and saved.is_dir()
    slurm(monkeypatch, "12", 2)
    assert start(own) == saved
    slurm(monkeypatch, "13")
    assert start(own) is None, "a new job, or the same command by hand, begins anew again"


def test_a_requeued_job_goes_on_from_its_own_checkpoints_not_from_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, run_dir = checkpoint(tmp_path / "source", 5), tmp_path / "run"
    stale = checkpoint(run_dir, 2)
    own = config(run_dir, str(source))
    slurm(monkeypatch, "12")
    assert start(own) == source and not stale.exists(), (
        "what another run left is no history of this one"
    )
    slurm(monkeypatch, "12", 1)
    assert start(own) == source, "the first start came to no checkpoint"
    later = checkpoint(run_dir, 7)
    slurm(monkeypatch, "12", 2)
    assert start(own) == later
    monkeypatch.delenv("SLURM_JOB_ID")
    assert start(own) == source and not later.exists()


def test_who_counts_as_the_same_job(tmp_path: Path) -> None:
    note_obeyed(tmp_path, "never", {})
    assert not was_obeyed(tmp_path, "never", {}), "by hand: never means never"
    assert was_obeyed(tmp_path, "never", {"TORCHELASTIC_RESTART_COUNT": "1"})
    job = {"SLURM_JOB_ID": "12"}
    note_obeyed(tmp_path, "never", job)
    assert not was_obeyed(tmp_path, "never", job), "two steps of one allocation, by hand"
    again = {**job, "SLURM_RESTART_COUNT": "1"}
    assert was_obeyed(tmp_path, "never", again) and not was_obeyed(
        tmp_path, tmp_path / "step-00000003", again
    )
    append_attempt(tmp_path, make_attempt(again))
    assert was_obeyed(tmp_path, "never", {}), (
        "ranks that ssh started do not have Slurm's variables: the job script's record has them"
    )


def skipped_sample(step: int, name: str, **more: Any) -> str:
    return json.dumps({"step": step, "sample_id": name, "reason": "gone", **more}) + "\n"


def test_samples_that_were_out_of_another_run_stay_out(tmp_path: Path) -> None:
    source, own = tmp_path / "source" / LEDGER, tmp_path / "run" / LEDGER
    source.mkdir(parents=True)
    (source / "skipped_samples-rank00001.jsonl").write_text(
        skipped_sample(3, "a@0") + skipped_sample(9, "late@0") + '{"step": 1, "samp'
    )
    (source / MARKS).write_text(
        skipped_sample(4, "b@0", rollback=1) + skipped_sample(9, "c@0", rollback=2)
    )
    for _ in range(2):
        assert inherit_samples(source, own, 9) == 2
        marks = Marks(own, main=True)
        assert (
            Ledger(own, 0).known.keys() == {"a@0", "b@0"}
            and marks.known.keys() == {"b@0"}
            and marks.rollbacks == 1
        )
    third = tmp_path / "third" / LEDGER
    assert inherit_samples(own, third, 9) == 2 and Ledger(third, 0).known.keys() == {"a@0", "b@0"}
    assert inherit_samples(tmp_path / "none", tmp_path / "fresh", 9) == 0 and not list(
        (tmp_path / "fresh").iterdir()
    )


def test_the_ledger_beside_a_checkpoint_of_another_run_is_the_one_that_is_taken_over(
    tmp_path: Path,
) -> None:
    source = checkpoint(tmp_path / "source", 5)
    (tmp_path / "source" / LEDGER).mkdir()
    (tmp_path / "source" / LEDGER / "skipped_samples-rank00000.jsonl").write_text(
        skipped_sample(3, "a@0") + skipped_sample(5, "later@0")
    )
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert start(config(run_dir, str(source))) == source
    assert Ledger(run_dir / LEDGER, 0).known.keys() == {"a@0"}
    checkpoint(run_dir, 7)
    assert (
        start(config(run_dir, str(run_dir / CHECKPOINTS / make_checkpoint_name(7)))) is not None
    ), "its own: nothing to take over"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b'{"a": 1}\n', b'{"a": 1}\n'),
        (b'{"a": 1}\n{"b', b'{"a": 1}\n'),
        (b'{"a', b""),
        (b'{"a": 1}', b'{"a": 1}\n'),
        (b"{}\n" + b"x" * 200_000, b"{}\n"),
    ],
    ids=["empty", "whole", "torn", "torn_first", "newline_missing", "torn_long"],
)
def test_a_torn_last_line_goes_and_nothing_else(
    tmp_path: Path, before: bytes, after: bytes
) -> None:
    path = tmp_path / "x.jsonl"
    repair_last_line(path)
    assert not path.exists()
    path.write_bytes(before)
    repair_last_line(path)
    assert path.read_bytes() == after


def test_records_after_a_torn_line_are_not_lost_with_it(tmp_path: Path) -> None:
    torn = '{"step": 4, "sample_'
    for name in ("skipped_samples-rank00000.jsonl", STARTS, MARKS):
        (tmp_path / name).write_text(torn)
    batch = pack([sample(1, ("a",)), sample(2, ("b",))])
    batch.skipped_samples[1] = "cut short"
    ledger, marks = Ledger(tmp_path, 0), Marks(tmp_path, main=True)
    ledger.begin(0)
    assert ledger.record(5, [batch]) == 1
    marks.add(5, SimpleNamespace(reason="bad"), [SimpleNamespace(sample="s9")], ALONE)  # type: ignore[arg-type, list-item]
    assert Ledger(tmp_path, 0).known.keys() == {"s2", "s9"} and Marks(
        tmp_path, main=True
    ).known.keys() == {"s9"}
    assert len([json.loads(line) for line in (tmp_path / STARTS).read_text().splitlines()]) == 1


@pytest.mark.parametrize(
    ("policy", "first", "there", "wanted"),
    [
        ("rollback", 0, None, True),
        ("rollback", 5, None, True),
        ("rollback", 5, 3, True),
        ("rollback", 5, 5, False),
        ("skip", 5, None, False),
    ],
)
def test_a_roll_back_always_has_a_checkpoint_to_come_to(
    tmp_path: Path, policy: str, first: int, there: int | None, wanted: bool
) -> None:
    if there is not None:
        checkpoint(tmp_path, there)
    run: Any = SimpleNamespace(
        guard=SimpleNamespace(policy=policy),
        first_step=first,
        config=config(tmp_path, "auto"),
        dist=ALONE,
    )
    assert needs_a_start(run) is wanted
