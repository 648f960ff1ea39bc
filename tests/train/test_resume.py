"""What a start resumes: `checkpoint.resume` once per job, the samples of another run, cut lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from one_rank import ONE_RANK

from onellm_dist.common.files import repair_last_line
from onellm_dist.common.run_files import (
    CHECKPOINT_MANIFEST,
    CHECKPOINTS,
    EXCLUDED,
    SAMPLES,
    STARTS,
)
from onellm_dist.config.schema import RunConfig
from onellm_dist.launch.slurm.attempts import append_attempt, make_attempt
from onellm_dist.train.checkpoint.folder import make_checkpoint_name
from onellm_dist.train.checkpoint.inherit import apply_resume, inherit_samples
from onellm_dist.train.checkpoint.resume import find_checkpoint
from onellm_dist.train.records.applied_resumes import record_applied, was_applied
from onellm_dist.train.records.run_directory import prepare_directory
from onellm_dist.train.records.sample_log import SampleLog
from onellm_dist.train.recovery import needs_first_checkpoint


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
    """What rank 0 of a start does with its directory; the checkpoint that it resumes."""
    found = find_checkpoint(own, own.run.dir / CHECKPOINTS, ONE_RANK)
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


def test_a_requeued_job_resumes_although_its_command_line_says_never(
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
    assert start(own) is None, "a new job, or the same command by hand, starts over"


def test_a_requeued_job_resumes_its_own_checkpoints_not_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, run_dir = checkpoint(tmp_path / "source", 5), tmp_path / "run"
    stale = checkpoint(run_dir, 2)
    own = config(run_dir, str(source))
    slurm(monkeypatch, "12")
    assert start(own) == source and not stale.exists(), (
        "what another run left does not belong to this one"
    )
    slurm(monkeypatch, "12", 1)
    assert start(own) == source, "the first start wrote no checkpoint"
    later = checkpoint(run_dir, 7)
    slurm(monkeypatch, "12", 2)
    assert start(own) == later
    monkeypatch.delenv("SLURM_JOB_ID")
    assert start(own) == source and not later.exists()


ALIASES: Mapping[str, Callable[[Path], Path]] = {
    "itself": lambda folder: folder,
    "latest": lambda folder: link(folder.parent / "latest", folder),
    "latest_elsewhere": lambda folder: link(folder.parents[2] / "current", folder),
    "link_to_link": lambda folder: link(folder.parent / "a", link(folder.parent / "b", folder)),
    "run_dir_behind_a_link": lambda folder: (
        link(folder.parents[2] / "alias", folder.parents[1]) / CHECKPOINTS / folder.name
    ),
    "checkpoints_behind_a_link": lambda folder: (
        link(folder.parents[2] / "saved", folder.parent) / folder.name
    ),
    "dots": lambda folder: folder.parent / ".." / CHECKPOINTS / "." / folder.name,
    "trailing_slash": lambda folder: Path(f"{folder}//"),
    "relative": lambda folder: Path(os.path.relpath(folder)),
    "proc": lambda folder: Path(f"/proc/self/root{folder}"),
}


def link(path: Path, target: Path) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.parametrize("alias", ALIASES)
def test_any_path_to_an_own_checkpoint_resumes_it_and_moves_only_later_ones(
    tmp_path: Path, alias: str
) -> None:
    run_dir = tmp_path / "run"
    earlier, wanted, later = (checkpoint(run_dir, step) for step in (3, 7, 11))
    given = ALIASES[alias](wanted)
    found = start(config(run_dir, str(given)))
    assert found is not None and found.samefile(wanted)
    assert earlier.is_dir() and wanted.is_dir() and not later.exists()
    assert [path.name for path in run_dir.glob("before-*/*")] == [later.name]
    assert not (run_dir / SAMPLES / "skipped-inherited.jsonl").exists(), "its own"


def test_an_own_checkpoint_under_another_name_is_compared_by_its_steps(tmp_path: Path) -> None:
    earlier, later = checkpoint(tmp_path, 3), checkpoint(tmp_path, 11)
    kept = tmp_path / CHECKPOINTS / "good"
    checkpoint(tmp_path, 7).rename(kept)
    own = config(tmp_path, str(kept))
    found = find_checkpoint(own, tmp_path / CHECKPOINTS, ONE_RANK)
    assert found.folder == kept
    prepare_directory(own, kept, 7)
    assert earlier.is_dir() and kept.is_dir() and not later.exists()


def test_the_run_dir_itself_may_be_a_link(tmp_path: Path) -> None:
    saved = checkpoint(tmp_path / "real", 5)
    alias = link(tmp_path / "alias", tmp_path / "real")
    assert start(config(alias, str(saved))) == saved and saved.is_dir()
    assert start(config(alias, "auto")) == alias / CHECKPOINTS / saved.name


def test_a_link_that_moves_on_is_applied_once_per_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, latest = checkpoint(tmp_path, 3), tmp_path / CHECKPOINTS / "latest"
    link(latest, first)
    own = config(tmp_path, str(latest))
    slurm(monkeypatch, "12")
    assert start(own) == first
    newer = checkpoint(tmp_path, 9)
    latest.unlink()
    link(latest, first)
    slurm(monkeypatch, "12", 1)
    assert start(own) == newer and newer.is_dir(), "the requeued job resumes, as with auto"


def test_what_counts_as_the_same_job(tmp_path: Path) -> None:
    record_applied(tmp_path, "never", {})
    assert not was_applied(tmp_path, "never", {}), "by hand: never means never"
    assert was_applied(tmp_path, "never", {"TORCHELASTIC_RESTART_COUNT": "1"})
    job = {"SLURM_JOB_ID": "12"}
    record_applied(tmp_path, "never", job)
    assert not was_applied(tmp_path, "never", job), "two steps of one allocation, by hand"
    again = {**job, "SLURM_RESTART_COUNT": "1"}
    assert was_applied(tmp_path, "never", again) and not was_applied(
        tmp_path, tmp_path / "step-00000003", again
    )
    append_attempt(tmp_path, make_attempt(again))
    assert was_applied(tmp_path, "never", {}), (
        "ranks that ssh started do not have Slurm's variables: the job script's record has them"
    )


def skipped_sample(step: int, name: str, **more: Any) -> str:
    return json.dumps({"step": step, "sample_id": name, "reason": "gone", **more}) + "\n"


def test_samples_that_were_left_out_of_another_run_stay_left_out(tmp_path: Path) -> None:
    source, own = tmp_path / "source" / SAMPLES, tmp_path / "run" / SAMPLES
    source.mkdir(parents=True)
    (source / "skipped-rank00001.jsonl").write_text(
        skipped_sample(3, "a@0") + skipped_sample(9, "late@0") + '{"step": 1, "samp'
    )
    (source / EXCLUDED).write_text(
        skipped_sample(4, "b@0", rollback=1) + skipped_sample(9, "c@0", rollback=2)
    )
    for _ in range(2):
        assert inherit_samples(source, own, 9) == 2
        log = SampleLog(own, rank=0)
        assert log.left_out.keys() == {"a@0", "b@0"}
        assert log.excluded.known.keys() == {"b@0"} and log.excluded.rollbacks == 1
    third = tmp_path / "third" / SAMPLES
    assert inherit_samples(own, third, 9) == 2
    assert SampleLog(third, rank=0).left_out.keys() == {"a@0", "b@0"}
    assert inherit_samples(tmp_path / "none", tmp_path / "fresh", 9) == 0
    assert not list((tmp_path / "fresh").iterdir())


def test_the_sample_log_beside_a_checkpoint_of_another_run_is_inherited(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", 5)
    (tmp_path / "source" / SAMPLES).mkdir()
    (tmp_path / "source" / SAMPLES / "skipped-rank00000.jsonl").write_text(
        skipped_sample(3, "a@0") + skipped_sample(5, "later@0")
    )
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert start(config(run_dir, str(source))) == source
    assert SampleLog(run_dir / SAMPLES, rank=0).left_out.keys() == {"a@0"}
    own = checkpoint(run_dir, 7)
    assert start(config(run_dir, str(own))) is not None, "its own: nothing is inherited"


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
    for name in ("skipped-rank00000.jsonl", STARTS, EXCLUDED):
        (tmp_path / name).write_text(torn)
    log = SampleLog(tmp_path, rank=0)
    log.begin(0)
    assert log.record_step(5, {"s2": "cut short"}) == 1
    log.exclude(5, "bad", ["s9"])
    again = SampleLog(tmp_path, rank=0)
    assert again.left_out.keys() == {"s2", "s9"} and again.excluded.known.keys() == {"s9"}
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
def test_a_rollback_always_has_a_checkpoint_to_return_to(
    tmp_path: Path, policy: str, first: int, there: int | None, wanted: bool
) -> None:
    if there is not None:
        checkpoint(tmp_path, there)
    assert needs_first_checkpoint(policy, tmp_path, first, ONE_RANK) is wanted
