"""Every script runs as its page says; the tutorial of signals installs and uses `thermal/`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from forked_python import get_programs

from onellm_dist import build_dataset

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the small toy world in `toy`."""
    out = tmp_path_factory.mktemp("examples")
    build_dataset("toyworld", None, out / "toy", options={"train": 16, "test": 2})
    return out


def run(folder: Path, *command: str) -> str:
    """Run Python in `folder` and return what it printed."""
    done = subprocess.run(
        [str(get_programs() / "python"), *command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_build_shards(folder: Path) -> None:
    photos = folder / "photos"
    photos.mkdir()
    for name in ("one", "two"):
        shutil.copy(EXAMPLES / "media/photo.jpg", photos / f"{name}.jpg")
        (photos / f"{name}.txt").write_text(f"a square, number {name}")
    out = run(folder, str(EXAMPLES / "build_shards.py"), "photos", "shards_of_photos")
    assert "2 samples of image" in out and "one, two" in out


def test_iterate_loader(folder: Path) -> None:
    out = run(folder, str(EXAMPLES / "iterate_loader.py"), "toy")
    assert {f"rank {r}, step {s}" for r in (0, 1) for s in (0, 1)} <= {
        line.split(", micro")[0] for line in out.splitlines()
    }
    assert "step 1: " in out
    assert re.search(r"  image: \d+ of torch\.uint8, input of torch\.float32", out)
    assert re.search(r"  audio: \d+ of torch\.float32, input of torch\.float32", out)


def test_train(folder: Path) -> None:
    out = run(folder, str(EXAMPLES / "train.py"), "toy", "runs/example")
    assert out.rstrip().endswith("done: 3 steps; the model is in runs/example/model")
    assert (folder / "runs/example/model/config.json").is_file()


def test_callback(folder: Path) -> None:
    out = run(folder, str(EXAMPLES / "callback.py"), "toy", "runs/watched")
    lines = (folder / "runs/watched/metrics.jsonl").read_text().splitlines()
    trends = [json.loads(line).get("loss_trend") for line in lines]
    losses = [json.loads(line)["loss"] for line in lines]
    assert trends[0] is None and trends[1] == pytest.approx(losses[0])
    assert trends[2] == pytest.approx(0.9 * losses[0] + 0.1 * losses[1])
    assert "loss trend after 3 steps" in out
