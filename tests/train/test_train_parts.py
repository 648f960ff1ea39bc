"""The small parts of training: stability, sample log, metrics, exit file, run directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_model import pack, sample

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.run_files import CHECKPOINT_MANIFEST
from onellm_dist.config.schema import RunConfig, StabilitySection
from onellm_dist.train.checkpoint.folder import list_checkpoints, make_checkpoint_name
from onellm_dist.train.records.exit_file import ExitFile
from onellm_dist.train.records.metrics import drop_from
from onellm_dist.train.records.run_directory import lock_directory, prepare_directory
from onellm_dist.train.records.skipped_samples import Ledger
from onellm_dist.train.run import run_dir_of, without_launcher_arguments
from onellm_dist.train.stability.checks import Guard


def test_guard_stops_after_skips_in_a_row_only() -> None:
    guard = Guard(StabilitySection(max_skipped=4), max_skipped_samples=5)
    for step in range(12):
        guard.count(step, applied=step % 4 == 0, new_skipped_samples=0)
    with pytest.raises(OneLLMError, match="in a row"):
        for step in range(4):
            guard.count(step, applied=False, new_skipped_samples=0)


def test_guard_counts_tombstones_of_earlier_starts() -> None:
    guard = Guard(StabilitySection(), max_skipped_samples=5, skipped_samples=4)
    guard.count(0, applied=True, new_skipped_samples=1)
    with pytest.raises(OneLLMError, match="max_skipped_samples is 5"):
        guard.count(1, applied=True, new_skipped_samples=1)


def test_ledger_is_read_back_by_any_rank_and_counts_once(tmp_path: Path) -> None:
    batch = pack([sample(1, ("a",)), sample(2, ("b",))])
    batch.skipped_samples[1] = "cut short"
    assert Ledger(tmp_path, 1).record(3, [batch]) == 1
    with (tmp_path / "skipped_samples-rank00001.jsonl").open("a") as out:
        out.write('{"step": 4, "sample_')  # a kill in the middle of a line
    again = Ledger(tmp_path, 0)
    assert again.known == {"s2": "cut short"}
    assert again.record(3, [batch]) == 0


def test_metrics_of_steps_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(6)) + '{"step": 6, "lo')
    assert [line["step"] for line in drop_from(path, 4)] == [4, 5], "what is lost is told"
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_the_rank_that_fails_first_is_believed(tmp_path: Path) -> None:
    assert ExitFile(tmp_path, 1).write("failed", reason="disk on fire") == 1
    assert ExitFile(tmp_path, 0).write("failed", reason="connection closed by peer") == 1
    found = json.loads((tmp_path / "exit.json").read_text())
    assert (found["reason"], found["rank"], found["exit_code"]) == ("disk on fire", 1, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["exit.json"]


def whole_checkpoint(folder: Path, *, size: int = 3) -> None:
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(b"abc")
    (folder / CHECKPOINT_MANIFEST).write_text(
        json.dumps({"version": 1, "files": {"rank-00000.safetensors": size}})
    )


def test_launcher_arguments_and_run_dir(tmp_path: Path) -> None:
    assert without_launcher_arguments(["--local_rank=1", "toy/align_image", "a=b"]) == [
        "toy/align_image",
        "a=b",
    ]
    broken = tmp_path / "r.yaml"
    broken.write_text("run: {dir: here}\nnonsense: 1\n")
    assert run_dir_of(broken, []) == Path("here")
    assert run_dir_of(broken, ["run.dir=there"]) == Path("there")
    assert run_dir_of(Path("no/such"), []) == Path("runs/default")


def run_config(run_dir: Path) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": str(run_dir)},
            "model": {"preset": "toy"},
            "data": {"mixture": [{"path": "image"}], "global_batch": 1},
            "train": {"stage": "align", "steps": 1},
            "optim": {"lr": 1.0},
        }
    )


def test_one_start_of_a_run_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onellm_dist.train.records.run_directory.LOCK_PATIENCE_S", 0.1)
    first = lock_directory(tmp_path)
    with pytest.raises(OneLLMError, match="in use"):
        lock_directory(tmp_path)
    first.close()
    lock_directory(tmp_path).close()


def test_a_start_from_nothing_moves_an_earlier_run_aside(tmp_path: Path) -> None:
    whole_checkpoint(tmp_path / "checkpoints" / make_checkpoint_name(4))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    prepare_directory(run_config(tmp_path), None)
    assert not list((tmp_path / "checkpoints").iterdir())
    assert [p.name for p in tmp_path.glob("before-*/checkpoints/*")] == [make_checkpoint_name(4)]
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "config.yaml").exists()


def test_a_start_from_an_older_checkpoint_moves_the_newer_ones_aside(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        whole_checkpoint(tmp_path / "checkpoints" / make_checkpoint_name(step))
    prepare_directory(run_config(tmp_path), tmp_path / "checkpoints" / make_checkpoint_name(4))
    assert list_checkpoints(tmp_path / "checkpoints") == [
        tmp_path / "checkpoints" / make_checkpoint_name(4)
    ]
    assert sorted(p.name for p in tmp_path.glob("before-*/*")) == [
        make_checkpoint_name(8),
        make_checkpoint_name(12),
    ]
