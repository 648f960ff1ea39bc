"""The files of a run directory: sample log, JSON lines, exit file, lock, and what is moved away."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.run_files import CHECKPOINT_MANIFEST
from onellm_dist.config.load import find_run_dir
from onellm_dist.config.schema import RunConfig
from onellm_dist.train.checkpoint.folder import list_checkpoints, make_checkpoint_name
from onellm_dist.train.records.exit_file import ExitFile
from onellm_dist.train.records.json_lines import drop_lines_from, read_lines, to_json
from onellm_dist.train.records.run_directory import (
    drop_repeated_lines,
    lock_directory,
    prepare_directory,
)
from onellm_dist.train.records.sample_log import SampleLog
from onellm_dist.train.run import drop_launcher_arguments


def test_the_sample_log_is_read_back_by_any_rank_and_counts_once(tmp_path: Path) -> None:
    assert SampleLog(tmp_path, rank=1).record_step(3, {"s2": "cut short"}) == 1
    with (tmp_path / "skipped-rank00001.jsonl").open("a") as out:
        out.write('{"step": 4, "sample_')  # a kill in the middle of a line
    again = SampleLog(tmp_path, rank=0)
    assert again.left_out == again.skipped.known == {"s2": "cut short"}
    assert again.unreadable == 1
    assert again.record_step(3, {"s2": "cut short"}) == 0


def test_excluded_samples_are_left_out_and_are_not_unreadable(tmp_path: Path) -> None:
    log = SampleLog(tmp_path, rank=0)
    assert log.exclude(4, "loss 9", ["s1"]) == 1
    assert log.record_step(5, {"s1": "torn"}) == 0, "left out already"
    again = SampleLog(tmp_path, rank=0)
    assert again.left_out.keys() == {"s1"} and again.unreadable == 0
    assert again.excluded.rollbacks == 1


def test_lines_of_repeated_steps_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    steps = [{"step": i, "seconds": 2.0} for i in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in steps) + '{"step": 6, "lo')
    validations = [{"steps_done": i} for i in (2, 4, 6)]
    other = tmp_path / "validation.jsonl"
    other.write_text("".join(json.dumps(line) + "\n" for line in validations))
    assert drop_repeated_lines(tmp_path, 4) == (2, 4.0), "what is lost is known"
    assert [line["step"] for line in read_lines(path)] == [0, 1, 2, 3]
    assert [line["steps_done"] for line in read_lines(other)] == [2, 4], "4 steps are done"
    assert [line["step"] for line in drop_lines_from(path, 2)] == [2, 3]
    assert drop_lines_from(tmp_path / "missing.jsonl", 0) == []


def test_records_need_no_torch() -> None:
    code = (
        "import importlib, pkgutil, sys; from onellm_dist.train import records as package; "
        "[importlib.import_module(f'{package.__name__}.{m.name}') "
        "for m in pkgutil.iter_modules(package.__path__)]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_json_has_null_for_numbers_that_are_not_finite() -> None:
    value: Any = {"a": float("nan"), "b": [1.0, float("inf")], "c": "x", "d": (2, None)}
    assert to_json(value) == {"a": None, "b": [1.0, None], "c": "x", "d": [2, None]}


def test_the_rank_that_fails_first_is_believed(tmp_path: Path) -> None:
    assert ExitFile(tmp_path, rank=1).write("failed", reason="disk on fire") == 1
    assert ExitFile(tmp_path, rank=0).write("failed", reason="connection closed by peer") == 1
    found = json.loads((tmp_path / "exit.json").read_text())
    assert (found["reason"], found["rank"], found["exit_code"]) == ("disk on fire", 1, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["exit.json"]


def complete_checkpoint(folder: Path, *, size: int = 3) -> None:
    folder.mkdir(parents=True)
    (folder / "rank-00000.safetensors").write_bytes(b"abc")
    (folder / CHECKPOINT_MANIFEST).write_text(
        json.dumps({"version": 1, "files": {"rank-00000.safetensors": size}})
    )


def test_launcher_arguments_and_run_dir(tmp_path: Path) -> None:
    assert drop_launcher_arguments(["--local_rank=1", "toy/align_image", "a=b"]) == [
        "toy/align_image",
        "a=b",
    ]
    broken = tmp_path / "r.yaml"
    broken.write_text("run: {dir: here}\nnonsense: 1\n")
    assert find_run_dir(broken, []) == Path("here")
    assert find_run_dir(broken, ["run.dir=there"]) == Path("there")
    assert find_run_dir(Path("no/such"), []) == Path("runs/default")


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
    complete_checkpoint(tmp_path / "checkpoints" / make_checkpoint_name(4))
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / ".adapter.before").mkdir()  # an export was killed in its last rename
    (tmp_path / ".adapter.before" / "adapter_config.json").write_text("{}")
    prepare_directory(run_config(tmp_path), None)
    assert not (tmp_path / "adapter").exists(), "it would lie beside the model of the new run"
    assert len(list(tmp_path.glob("before-*/adapter/adapter_config.json"))) == 1
    assert not list((tmp_path / "checkpoints").iterdir())
    assert [p.name for p in tmp_path.glob("before-*/checkpoints/*")] == [make_checkpoint_name(4)]
    assert not (tmp_path / "metrics.jsonl").exists()
    assert (tmp_path / "config.yaml").exists()


def test_a_start_from_an_older_checkpoint_moves_the_newer_ones_aside(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        complete_checkpoint(tmp_path / "checkpoints" / make_checkpoint_name(step))
    prepare_directory(run_config(tmp_path), tmp_path / "checkpoints" / make_checkpoint_name(4))
    assert list_checkpoints(tmp_path / "checkpoints") == [
        tmp_path / "checkpoints" / make_checkpoint_name(4)
    ]
    assert sorted(p.name for p in tmp_path.glob("before-*/*")) == [
        make_checkpoint_name(8),
        make_checkpoint_name(12),
    ]
