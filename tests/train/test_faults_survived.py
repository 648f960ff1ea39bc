"""What a run survives beside kills: full disks, damaged files, samples that end workers, a hang.

The engine is not what survives here: ZeRO-2 takes two thirds of the time of the recipe's ZeRO-3.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from survival_runs import EVERY, Runs, exported, find_sample, identical, make_runs, same_stream

from onellm_dist.train.records.skipped_samples import read_skipped_samples

pytestmark = pytest.mark.slow
PRESET: dict[str, Any] = {"model__path": "", "model__preset": "toy"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    toy, out = tmp_path_factory.mktemp("toy"), tmp_path_factory.mktemp("runs")
    return make_runs(toy, out, engine__config="zero2")


@pytest.fixture(scope="module")
def two(runs: Runs) -> str:
    """Two ranks, never interrupted."""
    runs.done("two")
    return "two"


@pytest.fixture(scope="module")
def clock(runs: Runs) -> str:
    """Three steps of two ranks, whose checkpoints are due by the clock; the model is a preset."""
    keys: dict[str, Any] = {"train__steps": 3, "checkpoint__every": 1000}
    runs.done("clock", **PRESET, **keys, checkpoint__every_minutes=1e-6)
    return "clock"


def measure_folder(folder: Path) -> int:
    """Bytes of the pages that its files take."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*"))


def read_manifest(runs: Runs, name: str, step: int) -> dict[str, Any]:
    path = runs.out / name / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_a_full_disk_ends_the_run_on_all_ranks_and_a_larger_one_resumes(
    runs: Runs, two: str
) -> None:
    folder = runs.out / "full" / "checkpoints"
    folder.mkdir(parents=True)
    size = int(2.5 * measure_folder(runs.out / two / "checkpoints" / "step-00000003"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        start = runs.start("full")
        assert start.wait() == [1, 1]
        assert "was not written" in start.output() and "No space left" in start.output()
        assert runs.checkpoints("full") == ["step-00000003", "step-00000006"] and not list(
            folder.glob(".step-*")
        )
        found = runs.exit("full")
        assert found["status"] == "failed" and "step-00000009" in found["reason"]
        assert (found["failed_step"], found["offending_samples"]) == (None, []), (
            "no step and no sample is responsible"
        )
        subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(folder)], check=True)
        runs.done("full")
        assert runs.events("full", "start")[-1]["first_step"] == 6
        identical(runs, "full", two)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_damaged_checkpoint_is_passed_over_loudly_and_never_lost(runs: Runs, two: str) -> None:
    runs.done("damaged", train__steps=2 * EVERY)
    newest = runs.out / "damaged" / "checkpoints" / f"step-{2 * EVERY:08d}"
    file = newest / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    asked = runs.start("damaged", checkpoint__resume=newest)
    assert asked.wait() == [2, 2] and "rank-00001.safetensors has sha256" in asked.output()
    start = runs.start("damaged")
    start.done()
    (event,) = runs.events("damaged", "checkpoint_damaged")
    assert event["folder"] == newest.name and "sha256" in event["problems"][0]
    assert "is damaged and passed over" in start.output()
    assert runs.events("damaged", "start")[-1]["first_step"] == EVERY
    assert list((runs.out / "damaged").glob(f"before-*/{newest.name}")), "moved aside"
    identical(runs, "damaged", two)


def test_a_rank_that_sleeps_ends_the_run_with_stacks_and_its_name(runs: Runs) -> None:
    start = runs.start(
        "hang",
        plant={"sleep": {"rank": 1, "step": 4}},
        engine__config="cpu",  # ZeRO-3: the other rank waits inside of its forward
        stability__hang_minutes=0.3,
        data__workers=2,
    )
    runs.wait_until(start, lambda: runs.steps_done("hang") >= 4)
    slept = time.monotonic()
    family = [child for pid in start.pids for child in psutil.Process(pid).children(recursive=True)]
    assert len(family) >= 4, "loader workers"
    assert start.wait(120) == [1, 1]
    assert time.monotonic() - slept < 60
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    found = runs.exit("hang")
    assert (
        found["status"] == "failed"
        and found["failure"] == "hang"
        and found["responsible_rank"] == 1
        and found["failed_step"] == 4
    )
    assert "rank 1 waits for nobody" in found["reason"]
    reports = [
        (runs.out / "hang" / "hangs" / f"rank-{rank:05d}.txt").read_text() for rank in (0, 1)
    ]
    assert (
        "sleepy" in reports[1]
        and "sleepy" not in reports[0]
        and "in_collective: True" in reports[0]
    )
    assert "'modalities': ['imu']" in reports[1] and "imu/" in reports[1]
    assert found["offending_samples"] and all(
        sample in reports[1] for sample in found["offending_samples"]
    )
    assert [end["failure"] for end in runs.events("hang", "end")] == ["hang"]


def test_samples_that_crash_hang_or_eat_memory_are_skipped_alike_after_a_kill_at_other_ranks(
    runs: Runs, two: str
) -> None:
    bad = [find_sample(runs, two, step) for step in (2, 4, 7)]
    plant: dict[str, Any] = {"poison": dict(zip(bad, ("crash", "hang", "eat"), strict=True))}
    keys = {"data__workers": 1, "data__sample_seconds": 3, "data__sample_mb": 400}
    runs.done("poison", 2, plant, **keys)
    start = runs.start("poison_killed", 2, plant, **keys)
    runs.wait_until(start, lambda: runs.steps_done("poison_killed") >= 5)
    start.kill()
    runs.done("poison_killed", 1, plant, **keys)
    skipped = []
    for name in ("poison", "poison_killed"):
        same_stream(runs, name, two)
        found = read_skipped_samples(runs.out / name / "samples")
        assert {sample.partition("@")[0] for sample in found} == set(bad)
        skipped.append(found)
    assert skipped[0] == skipped[1]
    reasons = " ".join(skipped[0].values())
    assert all(word in reasons for word in ("SIGSEGV", "data.sample_seconds", "data.sample_mb"))


def test_a_worker_without_memory_for_its_batch_ends_the_run_and_the_pending_save_completes(
    runs: Runs,
) -> None:
    plant = {"no_handover": 5, "slow_writes": 3.0}
    assert runs.start("no_handover", 1, plant, data__workers=1).wait() == [1]
    found = runs.exit("no_handover")
    assert found["status"] == "failed" and "cannot hand its batch" in found["reason"]
    assert EVERY <= found["failed_step"] <= 5 and found["offending_samples"] == []
    assert runs.checkpoints("no_handover") == [f"step-{EVERY:08d}"]


def test_asynchronous_and_waiting_checkpoints_are_equal_and_kept_as_asked(
    runs: Runs, two: str
) -> None:
    keys: dict[str, Any] = {
        "checkpoint__every": 2,
        "checkpoint__keep": 1,
        "checkpoint__keep_every": 4,
        "checkpoint__asynchronous": False,
    }
    runs.done("kept", data__validation="{split: test_seen, samples: 4, every: 4}", **keys)
    identical(runs, "kept", two)
    assert runs.checkpoints("kept") == ["step-00000004", "step-00000008", "step-00000012"]
    waited, background = runs.events("kept", "checkpoint"), runs.events(two, "checkpoint")
    assert [line["steps_done"] for line in waited] == [2, 4, 6, 8, 10, 12] and [
        line["steps_done"] for line in background
    ] == [3, 6, 9, 12]
    assert all(line["stall_seconds"] == pytest.approx(line["seconds"], abs=1e-3) for line in waited)
    assert all(line["stall_seconds"] < line["seconds"] for line in background[:-1])
    # Weights and two moments of what trains, in fp32; bytes that are said are those of the files.
    parts = ("upm.", "tokenizers.imu.", "projectors.imu.")
    weights = exported(runs.out / two)
    trained = sum(weights[key].numel() for key in weights if key.startswith(parts))
    for line in background:
        manifest = read_manifest(runs, two, line["steps_done"])
        assert sum(manifest["files"].values()) == line["bytes"] > 12 * trained
    assert (
        manifest["version"] == 2
        and set(manifest["sha256"]) == set(manifest["files"])
        and manifest["spans"] == {}
    )
    validated = {
        line["steps_done"]: line["loss"] for line in runs.lines("kept", "validation.jsonl")
    }
    best = json.loads((runs.out / "kept" / "best" / "best.json").read_text())
    assert best["loss"] == min(validated.values()) == validated[best["steps_done"]]
    assert (runs.out / "kept" / "best" / "model.safetensors").exists()


def test_other_frozen_weights_are_refused(runs: Runs, two: str) -> None:
    model = runs.out / "source"
    shutil.copytree(runs.out / two / "model", model)
    keys: dict[str, Any] = {
        "model__path": model,
        "model__preset": "",
        "train__steps": 2,
        "checkpoint__every": 1,
    }
    runs.done("frozen", 1, **keys)
    copied = runs.out / "copy"
    shutil.copytree(
        model, copied, copy_function=shutil.copyfile
    )  # another place and time, the same bytes
    runs.done("frozen", 2, **{**keys, "model__path": copied, "train__steps": 3})
    weights = copied / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    start = runs.start("frozen", 2, **{**keys, "model__path": copied, "train__steps": 4})
    assert start.wait() == [2, 2]
    assert (
        "other frozen weights" in start.output()
        and "model.safetensors has sha256" in start.output()
    )


def test_a_checkpoint_is_due_by_the_clock_on_all_ranks_together(runs: Runs, clock: str) -> None:
    assert runs.checkpoints(clock) == [f"step-{step:08d}" for step in (1, 2, 3)]


def test_a_preset_is_drawn_from_the_seed_of_its_run_alone(runs: Runs, clock: str) -> None:
    assert read_manifest(runs, clock, 3)["frozen"] == {"preset": "toy", "seed": 0}
    other = runs.start(clock, 1, run__seed=1, **PRESET)
    assert other.wait() == [2] and "run.seed was 0, now 1" in other.output()
