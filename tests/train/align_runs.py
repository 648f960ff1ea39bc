"""Whole runs of the toy recipe on image and IMU by any launcher, and what is compared of them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from small_onellm import get_small_keys
from zygote import Start, get_zygote

from onellm_dist.launch.local import find_free_port
from onellm_dist.shards import open_dataset
from onellm_dist.shards.sources.toyworld.build import build_toyworld

STEPS, EVERY, BATCH = 12, 4, 4
TIMEOUT_S = 800


def make_runner(folder: Path) -> Runner:
    """Build the toy world of the runs below `folder`; the runs go there too."""
    build_toyworld(
        folder / "toy",
        seed=0,
        train_per_modality=24,
        test_per_modality=1,
        modalities=("image", "imu"),
    )
    return Runner(folder / "toy", folder / "runs")


class Runner:
    """Starts the toy align run of a small model (image and IMU, fp32, 12 steps)."""

    def __init__(self, toy: Path, out: Path) -> None:
        self.toy, self.out = toy, out

    def overrides(self, name: str, **keys: Any) -> list[str]:
        fixed = {
            "data.root": self.toy,
            "run.dir": self.out / name,
            "train.steps": STEPS,
            "train.log_every": 1,
            "data.global_batch": BATCH,
            "data.workers": 1,
            "data.mixture": "[{path: image, weight: 1}, {path: imu, weight: 1}]",
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
            "optim.lr": 1e-3,
            "checkpoint.every": EVERY,
            "checkpoint.keep": 20,
        }
        own = {**get_small_keys(), **keys}
        given = {**fixed, **{key.replace("__", "."): value for key, value in own.items()}}
        return ["toy/align_image", *(f"{key}={value}" for key, value in given.items())]

    def start(
        self, name: str, ranks: int = 2, launcher: list[str] | None = None, **keys: Any
    ) -> subprocess.Popen[str]:
        command = launcher or [sys.executable, "-m", "onellm_dist.train"]
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        }
        return subprocess.Popen(
            [*command, *self.overrides(name, launch__ranks=ranks, **keys)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_forked(self, name: str, ranks: int = 2, **keys: Any) -> Start:
        """Start without a launcher: a zygote forks the ranks."""
        recipe, *overrides = self.overrides(name, **keys)
        return get_zygote().start(ranks, overrides, recipe=recipe)

    def fork(self, name: str, ranks: int = 2, **keys: Any) -> tuple[int, str]:
        """Run to the end, without a launcher."""
        start = self.start_forked(name, ranks, **keys)
        return start.code(TIMEOUT_S), start.output()

    def run(
        self, name: str, ranks: int = 2, launcher: list[str] | None = None, **keys: Any
    ) -> tuple[int, str]:
        process = self.start(name, ranks, launcher, **keys)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, output

    def metrics(self, name: str) -> list[dict[str, Any]]:
        path = self.out / name / "metrics.jsonl"
        return (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            if path.exists()
            else []
        )

    def exit(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / name / "exit.json").read_text())
        return found

    def wait_for_step(self, name: str, step: int, last_words: Callable[[], str | None]) -> None:
        """Wait for a step of a run; `last_words` says what it printed once it has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while not any(line["step"] >= step for line in self.metrics(name)):
            words = last_words()
            assert words is None, words
            assert time.monotonic() < deadline
            time.sleep(0.01)


def get_last_words(process: subprocess.Popen[str]) -> str | None:
    return None if process.poll() is None else process.communicate()[0]


def get_deepspeed_launcher() -> list[str]:
    """`deepspeed` for two CPU ranks. It passes no signals to them: a `stop` file does."""
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_accelerators",
        "2",
        "--master_port",
        str(find_free_port()),
    ]
    return [*command, "--module", "onellm_dist.train"]


def read_trainable_state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dictionary)
                state[f"{path.stem}/{key}"] = file.get_tensor(key)
    return state


def exported(run_dir: Path) -> dict[str, torch.Tensor]:
    with safe_open(run_dir / "model" / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def have_same_values(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def assert_same_run(runner: Runner, name: str, reference: str) -> None:
    given, wanted = runner.metrics(name), runner.metrics(reference)
    fields = ("step", "loss", "grad_norm", "lr", "sample_digest", "loss_by_modality")
    assert [[line[f] for f in fields] for line in given] == [
        [line[f] for f in fields] for line in wanted
    ]
    assert have_same_values(
        read_trainable_state(runner.out / name, STEPS),
        read_trainable_state(runner.out / reference, STEPS),
    )
    assert have_same_values(exported(runner.out / name), exported(runner.out / reference))


def get_rank_pid(run_dir: Path, rank: int) -> int:
    """The process of a rank of a run; its loader workers look the same, but are its children."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            said = (entry / "cmdline").read_bytes().split(b"\0")
            wanted = f"RANK={rank}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if wanted and f"run.dir={run_dir}".encode() in said:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(")")[2].split()[1]
                )
    (found,) = [pid for pid, parent in parents.items() if parent not in parents]
    return found


def make_sample_unreadable(toy: Path) -> Callable[[], None]:
    """Overwrite the media of one row of the image dataset; returns what puts it back."""
    dataset = open_dataset(toy / "image")
    shard = dataset.shards("train")[0]
    location = next(
        part for name, part in dataset.index(shard).parts(3).items() if name not in ("txt", "json")
    )
    path = dataset.root / shard.path
    whole = path.read_bytes()
    path.write_bytes(
        whole[: location.offset] + b"\0" * location.size + whole[location.offset + location.size :]
    )

    def repair() -> None:
        path.write_bytes(whole)

    return repair
