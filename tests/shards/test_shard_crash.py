"""A builder with worker processes, killed -9 as the kernel or an operator kills: the next call goes on and ends in the same bytes."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from shard_worlds import all_bytes, picture, write_tree

from onellm_dist.shards.build import build_dataset

UNITS, SAMPLES = 48, 4
CODE = """
import sys
from onellm_dist.shards.build import build_dataset
build_dataset("folder", sys.argv[1], sys.argv[2], workers=3, name="same", max_samples=4, dedup="exact", max_failures=0.5)
"""


def pictures(folder: Path) -> Path:
    """Every ninth is broken, every eleventh a copy."""
    files: dict[str, bytes | str] = {}
    for i in range(UNITS * SAMPLES):
        files[f"{i:04d}.jpg"] = b"broken" if i % 9 == 8 else picture(0 if i % 11 == 10 else i)
        files[f"{i:04d}.txt"] = f"caption {i}"
    return write_tree(folder, files)


def start(inputs: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CODE, str(inputs), str(out)], stderr=subprocess.PIPE)


def wait_for_units(out: Path, count: int, builder: subprocess.Popen[bytes]) -> None:
    """Until so many shards are done."""
    done, deadline = out.parent / f".{out.name}.building/done", time.monotonic() + 120
    while builder.poll() is None and len(list(done.glob("*.json"))) < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill(builder: subprocess.Popen[bytes], worker: bool) -> str:
    """Kills the builder, or one of its workers; all of them are gone afterwards. Returns what the builder printed."""
    workers = psutil.Process(builder.pid).children(recursive=True)
    victim = next((w for w in workers if worker and "spawn_main" in " ".join(w.cmdline())), None)
    (victim or builder).kill()
    text = builder.communicate(timeout=60)[1].decode()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive  # a worker ends with its parent
    return text


def killed_builds(tmp_path: Path, kills: int, seed: int) -> None:
    inputs, out = pictures(tmp_path / "in"), tmp_path / "out"
    build_dataset("folder", inputs, tmp_path / "alone", name="same", max_samples=SAMPLES, dedup="exact", max_failures=0.5)
    draw, died, done = random.Random(seed), 0, out.parent / f".{out.name}.building/done"
    for number, target in enumerate(sorted(draw.sample(range(1, UNITS - 12), kills))):
        builder = start(inputs, out)
        wait_for_units(out, target, builder)
        if builder.poll() is not None:
            assert builder.returncode == 0
            break
        text = kill(builder, worker=number % 3 == 1)
        died += builder.returncode != 0
        assert builder.returncode == -9 or "worker process died" in text
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
    killed_builds(tmp_path, 3, seed=0)  # each takes a start of four processes; the other kinds of kills are in test_shard_kills.py


@pytest.mark.soak
def test_a_builder_with_three_workers_survives_kills_for_long(tmp_path: Path) -> None:
    for round_ in range(4):
        (tmp_path / str(round_)).mkdir()
        killed_builds(tmp_path / str(round_), 5, seed=1 + round_)
