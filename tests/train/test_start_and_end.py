"""What a start says of itself: its phases, what it was at when it failed, what Slurm says of its job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from onellm_dist.data.micro_batch import MicroBatch, SampleRef
from onellm_dist.train.callbacks.startup_timing import NAMES, Phases
from onellm_dist.train.records.exit_file import ExitFile
from onellm_dist.train.records.metrics import Events
from onellm_dist.train.setup import _slurm, _tell_failed


def micro(step: int, *rows: int) -> MicroBatch:
    return MicroBatch(step, 0, 0, 1, tuple(SampleRef(0, 0, row, 0, 5, 4) for row in rows), 8)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_phases_are_told_once_and_in_order(tmp_path: Path) -> None:
    phases = Phases()
    phases.imported()
    with phases.of("data"):
        pass
    for _ in range(2):
        phases.first_step(3.0, 1.0, Events(tmp_path, main=True))
    found = events(tmp_path)
    assert [line["name"] for line in found] == list(NAMES)
    seconds = {line["name"]: line["seconds"] for line in found}
    assert (
        seconds["imports"] > 0
        and seconds["first_step"] == 2.0
        and seconds["data"] >= 1.0
        and seconds["engine"] == 0
    )
    with pytest.raises(ValueError, match="lunch"):
        phases.add("lunch", 1)


def test_a_failure_names_its_step_and_the_samples_in_flight(tmp_path: Path) -> None:
    exit_file = ExitFile(tmp_path, 2)
    exit_file.step = 7
    exit_file.on_failure = lambda found: _tell_failed(tmp_path, found)
    exit_file.in_flight.names = lambda m: [f"toy/shard/{ref.row}@0" for ref in m.samples]
    exit_file.in_flight.beat("forward", step=7, micro=micro(7, 3, 4))
    assert exit_file.write("failed", reason="disk on fire") == 1
    ExitFile(tmp_path, 0).write("failed", reason="connection closed")
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


def test_a_failure_outside_the_steps_suspects_nobody_and_names_that_cannot_be_read_hide_nothing(
    tmp_path: Path,
) -> None:
    exit_file = ExitFile(tmp_path, 0)
    exit_file.in_flight.names = lambda m: (_ for _ in ()).throw(OSError("gone"))
    exit_file.in_flight.beat("forward", step=1, micro=micro(1, 3))
    assert exit_file.in_flight.suspects() == []
    exit_file.in_flight.rest("export")
    exit_file.write("failed", reason="no room")
    found = json.loads((tmp_path / "exit.json").read_text())
    assert (found["failed_step"], found["offending_samples"], found["reason"]) == (
        None,
        [],
        "no room",
    )


def test_a_loader_worker_that_died_makes_suspects_of_what_was_read_ahead(tmp_path: Path) -> None:
    exit_file = ExitFile(tmp_path, 0)
    exit_file.in_flight.names = lambda m: [f"s{ref.row}" for ref in m.samples]
    exit_file.in_flight.following = lambda m: [micro(2, 5), micro(2)]
    exit_file.in_flight.beat("data", step=1, micro=micro(1, 3))
    assert exit_file.in_flight.suspects() == ["s3"]
    exit_file.write(
        "failed", reason="RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed."
    )
    assert json.loads((tmp_path / "exit.json").read_text())["offending_samples"] == ["s3", "s5"]


def test_slurm_is_read_where_it_is_there() -> None:
    assert _slurm({}) == {}
    env = {
        "SLURM_JOB_ID": "12",
        "SLURM_RESTART_COUNT": "2",
        "SLURM_NNODES": "3",
        "SLURM_JOB_NODELIST": "n[1-3]",
    }
    assert _slurm(env) == {
        "slurm_job_id": "12",
        "slurm_restart_count": 2,
        "slurm_nodes": 3,
        "slurm_node_list": "n[1-3]",
    }
    assert _slurm({"SLURM_JOB_ID": "12"})["slurm_restart_count"] == 0
