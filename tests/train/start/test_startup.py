"""How a start begins and ends: its timing, `exit.json`, and what it says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onellm_dist.common.errors import MachineError
from onellm_dist.data.micro_batch import MicroBatch, SampleRef
from onellm_dist.train.callbacks.startup_timing import PARTS, StartupTiming
from onellm_dist.train.records.events import Events
from onellm_dist.train.records.exit_file import ExitFile
from onellm_dist.train.start.records import describe_slurm_job, write_failed_end


def micro(step: int, *rows: int) -> MicroBatch:
    return MicroBatch(step, 0, 0, 1, tuple(SampleRef(0, 0, row, 0, 5, 4) for row in rows), 8)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_the_parts_of_a_start_are_recorded_once_and_in_order(tmp_path: Path) -> None:
    timing = StartupTiming()
    timing.measure_imports()
    with timing.measure("data"):
        pass
    for _ in range(2):
        timing.write(3.0, 1.0, Events(tmp_path, enabled=True))
    found = events(tmp_path)
    assert [line["name"] for line in found] == list(PARTS)
    seconds = {line["name"]: line["seconds"] for line in found}
    assert (
        seconds["imports"] > 0
        and seconds["first_step"] == 2.0
        and seconds["data"] >= 1.0
        and seconds["engine"] == 0
    )
    with pytest.raises(ValueError, match="lunch"):
        timing.add("lunch", 1)


def test_a_failure_names_its_step_and_the_samples_under_way(tmp_path: Path) -> None:
    exit_file = ExitFile(tmp_path, rank=2)
    exit_file.heartbeat.steps_done = 7
    exit_file.on_failure = lambda found: write_failed_end(tmp_path, found)
    exit_file.heartbeat.sample_names = lambda m: [f"toy/shard/{ref.row}@0" for ref in m.samples]
    exit_file.heartbeat.enter("forward", step=7, micro_batch=micro(7, 3, 4))
    assert exit_file.write("failed", reason="disk on fire") == 1
    ExitFile(tmp_path, rank=0).write("failed", reason="connection closed")
    found = json.loads((tmp_path / "exit.json").read_text())
    assert (found["failed_step"], found["offending_samples"], found["rank"]) == (
        7,
        ["toy/shard/3@0", "toy/shard/4@0"],
        2,
    )
    ends = [line for line in events(tmp_path) if line["event"] == "end"]
    assert [(line["reason"], line["failed_step"], line["offending_samples"]) for line in ends] == [
        ("disk on fire", 7, found["offending_samples"])
    ]


def test_a_failure_outside_of_steps_names_no_sample_and_unreadable_names_hide_nothing(
    tmp_path: Path,
) -> None:
    exit_file = ExitFile(tmp_path, rank=0)
    exit_file.heartbeat.sample_names = lambda m: (_ for _ in ()).throw(OSError("gone"))
    exit_file.heartbeat.enter("forward", step=1, micro_batch=micro(1, 3))
    assert exit_file.heartbeat.offending_samples() == []
    exit_file.heartbeat.leave_step("export")
    exit_file.write("failed", reason="no room")
    found = json.loads((tmp_path / "exit.json").read_text())
    assert (found["failed_step"], found["offending_samples"], found["reason"]) == (
        None,
        [],
        "no room",
    )


def test_where_the_machine_failed_no_sample_is_named(tmp_path: Path) -> None:
    exit_file = ExitFile(tmp_path, rank=0)
    exit_file.heartbeat.sample_names = lambda m: [f"s{ref.row}" for ref in m.samples]
    exit_file.heartbeat.enter("data", step=1, micro_batch=micro(1, 3))
    assert exit_file.heartbeat.offending_samples() == ["s3"]
    exit_file.write_failure(MachineError("no memory"))
    found = json.loads((tmp_path / "exit.json").read_text())
    assert (found["offending_samples"], found["failed_step"]) == ([], 1)


def test_slurm_is_read_inside_a_job() -> None:
    assert describe_slurm_job({}) == {}
    env = {
        "SLURM_JOB_ID": "12",
        "SLURM_RESTART_COUNT": "2",
        "SLURM_NNODES": "3",
        "SLURM_JOB_NODELIST": "n[1-3]",
    }
    assert describe_slurm_job(env) == {
        "slurm_job_id": "12",
        "slurm_restart_count": 2,
        "slurm_nodes": 3,
        "slurm_node_list": "n[1-3]",
    }
    assert describe_slurm_job({"SLURM_JOB_ID": "12"})["slurm_restart_count"] == 0
