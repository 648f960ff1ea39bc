"""The hang watchdog: which rank it holds responsible, and when; and the order of the heartbeat."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from one_rank import ONE_RANK
from small_model import pack, sample

from onellm_dist.common.run_files import HANGS
from onellm_dist.config.schema import StabilitySection
from onellm_dist.data.micro_batch import MicroBatch, SampleRef
from onellm_dist.train.callbacks.callback_list import CallbackList
from onellm_dist.train.callbacks.watchdog import (
    HangWatchdog,
    find_responsible_ranks,
    format_stacks,
    is_in_collective,
)
from onellm_dist.train.heartbeat import Heartbeat
from onellm_dist.train.records.exit_file import ExitFile
from onellm_dist.train.records.metrics import MetricSet
from onellm_dist.train.records.run_directory import move_hangs_aside
from onellm_dist.train.step.rank_time import RankTime
from onellm_dist.train.trainer import Trainer


@pytest.fixture(autouse=True)
def no_child_of_the_tests_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's children end with it (test_survival.py); here one may be another test's zygote."""
    monkeypatch.setattr("onellm_dist.train.callbacks.watchdog.end_children", lambda: None)


def make_report(rank: int, count: int, *, waits: bool) -> dict[str, Any]:
    return {"rank": rank, "heartbeats": count, "in_collective": waits}


@pytest.mark.parametrize(
    ("reports", "world_size", "responsible"),
    [
        ({0: make_report(0, 9, waits=True), 1: make_report(1, 9, waits=False)}, 2, [1]),
        ({0: make_report(0, 9, waits=True), 1: make_report(1, 8, waits=True)}, 2, [1]),
        ({0: make_report(0, 9, waits=False), 1: make_report(1, 8, waits=False)}, 2, [1]),
        ({0: make_report(0, 9, waits=True)}, 3, [1, 2]),
        ({0: make_report(0, 9, waits=True), 1: make_report(1, 9, waits=True)}, 2, []),
        ({0: make_report(0, 9, waits=False)}, 1, [0]),
    ],
    ids=["waits_for_nobody", "fewest_heartbeats", "behind_on_gpu", "silent", "nobody", "alone"],
)
def test_which_ranks_are_held_responsible(
    reports: dict[int, dict[str, Any]], world_size: int, responsible: list[int]
) -> None:
    assert find_responsible_ranks(reports, world_size)[0] == responsible


def test_a_thread_in_a_collective_is_distinguished_from_one_that_is_not() -> None:
    assert not is_in_collective(sys._current_frames(), threading.get_ident())

    def frame(path: str, back: Any = None) -> Any:
        return SimpleNamespace(f_code=SimpleNamespace(co_filename=path), f_back=back)

    gather = frame("/lib/deepspeed/runtime/zero/partition_parameters.py")
    assert is_in_collective({1: frame("/lib/torch/nn/linear.py"), 2: gather}, 3)
    assert is_in_collective({1: frame("/lib/torch/distributed/distributed_c10d.py")}, 3)
    assert is_in_collective({1: frame("/lib/deepspeed/utils/nvtx.py", back=gather)}, 3)
    for waits in (
        "torch/cuda/streams.py",
        "torch/cuda/__init__.py",
        "onellm_dist/train/totals.py",
        "onellm_dist/train/engine/fsdp/engine.py",
    ):
        assert is_in_collective(
            {1: frame(f"/lib/{waits}", back=frame("/lib/onellm_dist/train/trainer.py"))}, 3
        ), "on a GPU"
    assert not is_in_collective({1: frame("/lib/onellm_dist/train/trainer.py")}, 3)
    assert not is_in_collective({1: frame("/lib/torch/nn/linear.py", back=gather)}, 3), (
        "a module that runs under ZeRO waits for nobody"
    )
    assert not is_in_collective({1: frame("/lib/torch/nn/linear.py"), 3: gather}, 3), (
        "the watching thread does not count"
    )


class ReducedError(Exception):
    """The step has come to its reduction."""


def test_a_rank_that_reached_the_reduction_is_ahead_of_one_in_its_backward() -> None:
    """On a GPU ranks wait for a late one in the reduction; it must have the fewest heartbeats."""
    heartbeat = Heartbeat()
    phases: list[tuple[str, int]] = []
    micro = SimpleNamespace(step=4, index=0, last=True)
    plan: Any = SimpleNamespace(step=4, ranks=[[micro]], loss_count=1)

    def see(*_: Any, **__: Any) -> Any:
        phases.append((heartbeat.phase, heartbeat.count))
        return torch.zeros(()), torch.zeros(1), torch.zeros(1, dtype=torch.int64)

    def stop(*_: Any) -> int:
        see()
        raise ReducedError

    trainer = object.__new__(Trainer)
    vars(trainer).update(
        session=SimpleNamespace(dist=ONE_RANK, heartbeat=heartbeat),
        engine=SimpleNamespace(forward=see, backward=see),
        callbacks=CallbackList(),
        meter=SimpleNamespace(metrics=MetricSet()),
        sample_log=SimpleNamespace(record_step=stop),
        _combinations=[("a",)],
        _time=RankTime(torch.nn.Module(), torch.device("cpu")),
        _micro_batches=SimpleNamespace(next=lambda _: pack([sample(1, ("a",))])),
    )
    heartbeat.enter("plan", step=4)
    local = trainer._forward_backward(plan)
    with pytest.raises(ReducedError):
        trainer._reduce(plan, local)
    assert phases == [("forward", 3), ("backward", 4), ("reduce", 5)]


@contextmanager
def watch(run_dir: Path, ended: threading.Event, **keys: Any) -> Iterator[HangWatchdog]:
    config = StabilitySection(hang_minutes=0.005, first_step_minutes=0.01, **keys)
    watchdog = HangWatchdog(
        run_dir,
        rank=0,
        world_size=1,
        config=config,
        exit_file=ExitFile(run_dir, rank=0),
        end_process=lambda code: ended.set(),
    )
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.close()


def test_the_main_thread_stands_first_among_any_number_of_threads() -> None:
    done = threading.Event()
    threads = [threading.Thread(target=done.wait, name=f"waits {n}") for n in range(120)]
    for thread in threads:
        thread.start()
    stacks = format_stacks(sys._current_frames()).split("\n\n")
    done.set()
    assert "(MainThread)" in stacks[0] and "test_watchdog.py" in stacks[0]
    assert sum("(waits " in stack and "threading.py" in stack for stack in stacks) == 120
    for thread in threads:
        thread.join()


def test_a_watchdog_stays_quiet_while_there_is_progress_and_bites_when_there_is_none(
    tmp_path: Path,
) -> None:
    ended = threading.Event()
    with watch(tmp_path, ended, validation_minutes=60.0) as watchdog:
        heartbeat = watchdog._heartbeat
        assert watchdog.limit_seconds() == pytest.approx(0.6)
        for _ in range(10):
            heartbeat.enter("forward", step=4)
            time.sleep(0.1)
        heartbeat.first_step_done = True
        assert watchdog.limit_seconds() == pytest.approx(0.3)
        heartbeat.enter("validation")
        assert watchdog.limit_seconds() == 3600
        time.sleep(1)
        assert not ended.is_set()
        heartbeat.enter("forward", step=5)
        assert ended.wait(10)
    report = (tmp_path / HANGS / "rank-00000.txt").read_text()
    assert "step: 5" in report and "test_watchdog.py" in report, "the stack of this very line"
    found = json.loads((tmp_path / "exit.json").read_text())
    assert (found["status"], found["failure"], found["failed_step"], found["responsible_rank"]) == (
        "failed",
        "hang",
        5,
        0,
    )
    assert "no progress" in found["reason"]
    move_hangs_aside(tmp_path)
    assert (
        not (tmp_path / HANGS).exists()
        and len(list(tmp_path.glob(f"{HANGS}-*/rank-00000.txt"))) == 1
    )


def test_nobody_watches_with_hang_minutes_zero(tmp_path: Path) -> None:
    watchdog = HangWatchdog(
        tmp_path,
        rank=0,
        world_size=1,
        config=StabilitySection(hang_minutes=0),
        exit_file=ExitFile(tmp_path, rank=0),
    )
    watchdog.start()
    assert not watchdog.is_watching
    watchdog.close()


@pytest.mark.parametrize(
    ("workers", "phase", "named"), [(2, "data", 0), (0, "data", 1), (2, "forward", 1)]
)
def test_a_hang_of_the_loader_names_no_sample(
    tmp_path: Path, workers: int, phase: str, named: int
) -> None:
    """Its workers end a sample that hangs by themselves: what is left is a disk."""
    exit_file = ExitFile(tmp_path, rank=0)
    heartbeat = exit_file.heartbeat
    heartbeat.loader_workers = workers
    heartbeat.sample_names = lambda micro: ["imu/a/1@0"]
    heartbeat.enter(
        phase, step=3, micro_batch=MicroBatch(3, 0, 0, 1, (SampleRef(0, 0, 1, 0, 5, 4),), 4)
    )
    watchdog = HangWatchdog(
        tmp_path,
        rank=0,
        world_size=1,
        config=StabilitySection(first_step_minutes=0.002, hang_minutes=0.002),
        exit_file=exit_file,
    )
    watchdog.start()
    deadline = time.monotonic() + 20
    while not (tmp_path / "exit.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    watchdog.close()
    found = json.loads((tmp_path / "exit.json").read_text())
    assert found["failure"] == "hang" and len(found["offending_samples"]) == named
