"""A run typed into a terminal: what lies in its folder, what its shell has set, and its end."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from small_onellm import get_small_model

from onellm_dist.shards.sources.toyworld.build import build_toyworld

pytestmark = pytest.mark.slow
STEPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with data, and with files named like modules of Python and of others."""
    folder = tmp_path_factory.mktemp("terminal")
    build_toyworld(folder, seed=0, train_per_modality=32, test_per_modality=2, modalities=("imu",))
    for name in ("random.py", "json.py", "queue.py", "numpy.py", "torch/__init__.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise RuntimeError('not meant to be imported')")
    return folder


def make_command(name: str, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "onellm_dist.train", "toy/align_image", f"run.dir={name}"),
        *("data.mixture=[{path: imu, weight: 1}]", "data.root=.", "data.global_batch=4"),
        *(f"train.steps={STEPS}", "checkpoint.every=1000", "data.workers=1"),
        *(f"model.path={get_small_model()}", "model.preset=", *more),
    ]


def make_environment(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "PYTHONSAFEPATH")}
    return {**env, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    ours, theirs = pty.openpty()
    yield ours, theirs
    for descriptor in (ours, theirs):
        with contextlib.suppress(OSError):
            os.close(descriptor)


def test_two_ranks_among_shadows_and_a_closed_terminal_leave_a_checkpoint(
    folder: Path, terminal: tuple[int, int]
) -> None:
    """Nobody reads the terminal, then it is gone; the run writes its checkpoint all the same."""
    ours, theirs = terminal
    before = set(os.listdir("/dev/shm"))
    process = subprocess.Popen(
        make_command("closed"),
        cwd=folder,
        env=make_environment(),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    metrics = folder / "closed" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    os.close(ours)
    os.close(theirs)
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 75
    found = json.loads((folder / "closed" / "exit.json").read_text())
    assert (found["status"], found["reason"]) == ("preempted", "SIGHUP")
    assert list((folder / "closed" / "checkpoints").glob("step-*"))
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]
    assert set(os.listdir("/dev/shm")) <= before
    modes = {path.stat().st_mode & 0o777 for path in (folder / "closed").glob("*.json*")}
    assert modes and not any(mode & 0o007 for mode in modes)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "launch.ranks=2, but RANK and WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set"),
    ],
)
def test_stray_variables_are_refused_with_an_exit_file(
    folder: Path, variables: dict[str, str], words: str
) -> None:
    name = f"stray{len(variables)}"
    done = subprocess.run(
        make_command(name, "launch.ranks=2"),
        cwd=folder,
        env=make_environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    found = json.loads((folder / name / "exit.json").read_text())
    assert words in done.stderr and found["status"] == "usage" and words in found["reason"]
