"""A builder with workers is killed (SIGKILL): the next call resumes and ends in the same bytes."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import psutil
import pytest
from shard_worlds import all_bytes, picture, write_tree
from stores import local_s3, stored, upload

from onellm_dist.shards import build_dataset

UNITS, SAMPLES = 48, 4
CODE = """
import sys
from onellm_dist.shards import build_dataset
options = {"name": "same", "max_samples": 4, "dedup": "exact", "max_failures": 0.5}
build_dataset("folder", sys.argv[1], sys.argv[2], options=options, workers=3)
"""
REMOTE = """
import sys
from onellm_dist.shards import build_dataset
options = {"modality": "text", "name": "same", "max_samples": 4}
build_dataset("reference-lists", sys.argv[1], sys.argv[2], options=options)
"""


def pictures(folder: Path) -> Path:
    """Every ninth is broken, every eleventh a copy."""
    files: dict[str, bytes | str] = {}
    for i in range(UNITS * SAMPLES):
        files[f"{i:04d}.jpg"] = b"broken" if i % 9 == 8 else picture(0 if i % 11 == 10 else i)
        files[f"{i:04d}.txt"] = f"caption {i}"
    return write_tree(folder, files)


def start(inputs: Path | str, out: Path | str, code: str = CODE) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", code, str(inputs), str(out)], stderr=subprocess.PIPE
    )


def wait_for_units(done: Callable[[], int], count: int, builder: subprocess.Popen[bytes]) -> None:
    """Until so many shards are done."""
    deadline = time.monotonic() + 120
    while builder.poll() is None and done() < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill(builder: subprocess.Popen[bytes], worker: bool) -> str:
    """Kill the builder or one of its workers, and return its output; no process is left."""
    workers = psutil.Process(builder.pid).children(recursive=True)
    victim = next((w for w in workers if worker and "spawn_main" in " ".join(w.cmdline())), None)
    (victim or builder).kill()
    text = builder.communicate(timeout=60)[1].decode()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive  # a worker ends with its parent
    return text


def killed_builds(tmp_path: Path, kills: int, seed: int) -> None:
    inputs, out = pictures(tmp_path / "in"), tmp_path / "out"
    build_dataset(
        "folder",
        inputs,
        tmp_path / "alone",
        options={"name": "same", "max_samples": SAMPLES, "dedup": "exact", "max_failures": 0.5},
    )
    draw, died, done = random.Random(seed), 0, out.parent / f".{out.name}.building/done"
    for number, target in enumerate(sorted(draw.sample(range(1, UNITS - 12), kills))):
        builder = start(inputs, out)
        wait_for_units(lambda: len(list(done.glob("*.json"))), target, builder)
        if builder.poll() is not None:
            assert builder.returncode == 0
            break
        text = kill(builder, worker=number % 3 == 1)
        died += builder.returncode != 0
        assert builder.returncode == -9 or "a worker process of the builder died" in text
        assert not out.exists()
        assert len(list(done.glob("*.json"))) >= target  # nothing that was done is lost
    assert died
    if not out.exists():
        builder = start(inputs, out)
        text = builder.communicate(timeout=120)[1].decode()
        assert builder.returncode == 0, text
    assert all_bytes(out) == all_bytes(tmp_path / "alone")
    assert not (tmp_path / ".out.building").exists()


@pytest.mark.slow
def test_a_builder_with_three_workers_survives_kills(tmp_path: Path) -> None:
    """The builder, then a worker; the other kinds of kills are in test_shard_kills.py."""
    killed_builds(tmp_path, 2, seed=0)


@pytest.mark.soak
def test_a_builder_with_three_workers_survives_kills_for_long(tmp_path: Path) -> None:
    for round_ in range(4):
        (tmp_path / str(round_)).mkdir()
        killed_builds(tmp_path / str(round_), 5, seed=1 + round_)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(5,), pytest.param((2, 8), marks=pytest.mark.soak)])
def test_a_builder_that_writes_to_a_store_survives_kills(
    tmp_path: Path, kills: tuple[int, ...]
) -> None:
    rows = "".join(f"caption {i}\tnone\n" for i in range(4 * 16))
    inputs = write_tree(tmp_path / "in", {"a.csv": f"caption\turl\n{rows}"})
    build_dataset(
        "reference-lists",
        inputs,
        tmp_path / "alone",
        options={"modality": "text", "name": "same", "max_samples": 4},
    )
    with local_s3("crash") as bucket:
        upload(inputs, f"{bucket}/in")
        store = fsspec.filesystem("s3")

        def done() -> int:
            store.invalidate_cache()
            return len(store.glob(f"{bucket}/out/.building/done/*.json"))

        for target in kills:
            builder = start(f"{bucket}/in", f"{bucket}/out", REMOTE)
            wait_for_units(done, target, builder)
            kill(builder, worker=False)
            assert builder.returncode == -9
            assert not store.exists(f"{bucket}/out/manifest.json")
        builder = start(f"{bucket}/in", f"{bucket}/out", REMOTE)
        text = builder.communicate(timeout=120)[1].decode()
        assert builder.returncode == 0, text
        assert stored(f"{bucket}/out") == all_bytes(tmp_path / "alone")
