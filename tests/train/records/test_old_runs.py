"""Run directories and checkpoints of 0.1.0 are answered by the new names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from onellm_dist.common.errors import UsageError
from onellm_dist.report.command import run_report
from onellm_dist.train.records.old_runs import check_manifest, check_run_directory
from onellm_dist.train.sample_log.stream import RunStream

OLD_FILES = (
    "segments.json",
    "datasets.json",
    "progress",
    "starts.jsonl",
    "tombstones-rank00000.jsonl",
    "tombstones-rank00001.jsonl",
    "tombstones-ranks-guard.jsonl",
    "tombstones-ranks-source.jsonl",
)
"""All that 0.1.0 writes into `ledger/`."""


def test_a_run_of_0_1_0_is_refused_with_old_and_new_names(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    for name in OLD_FILES:
        (tmp_path / "ledger" / name).write_text("[]")
    (tmp_path / "config.yaml").write_text(
        "guard: {policy: skip, window: 8}\ndata: {max_tombstones: 3, new_segment: false}\n"
    )
    checkpoint = tmp_path / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    manifest = {"segments": [], "guard": {}, "step": 4, "world": 2}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError) as raised:
        check_run_directory(tmp_path)
    message = str(raised.value)
    for text in (
        "ledger is called samples/ now",
        "ledger/segments.json is called samples/data_phases.json now",
        "ledger/tombstones-rank*.jsonl is called samples/skipped-rank*.jsonl now",
        "ledger/tombstones-ranks-guard.jsonl is called samples/excluded.jsonl now",
        "ledger/tombstones-ranks-source.jsonl is called samples/skipped-inherited.jsonl now",
        "config.yaml: guard.policy is called stability.policy now",
        "config.yaml: data.max_tombstones is called data.max_skipped_samples now",
        "config.yaml: data.new_segment is called data.new_phase now",
        "manifest.json: segments is called data_phases now",
        "manifest.json: guard is called stability now",
        "manifest.json: step is called steps_done now",
        "manifest.json: world is called world_size now",
        "another run.dir",
    ):
        assert text in message
    with pytest.raises(UsageError, match=r"is a run of onellm_dist 0\.1\.0"):
        RunStream(tmp_path)
    with pytest.raises(UsageError, match=r"is a run of onellm_dist 0\.1\.0"):
        run_report(tmp_path, None, as_json=False)


def test_a_checkpoint_of_0_1_0_is_refused_with_old_and_new_names(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="guard is called stability now"):
        check_manifest(tmp_path, {"guard": {}, "step": 4})
    check_manifest(tmp_path, {"stability": {}, "steps_done": 4})


def test_a_new_run_and_no_run_are_accepted(tmp_path: Path) -> None:
    check_run_directory(tmp_path / "nothing")
    (tmp_path / "samples").mkdir()
    (tmp_path / "config.yaml").write_text("stability: {policy: skip}\n")
    check_run_directory(tmp_path)
