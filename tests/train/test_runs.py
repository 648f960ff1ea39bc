"""Whole runs of the toy recipe: equal for any launcher, number of ranks and history of stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from zygote import Start, get_zygote

from onellm_dist.launch.local import find_free_port
from onellm_dist.shards.sources.toyworld.build import build_toyworld

pytestmark = pytest.mark.slow
STEPS, EVERY, BATCH = 12, 4, 4
TIMEOUT_S = 800


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy")
    build_toyworld(
        out, seed=0, train_per_modality=24, test_per_modality=1, modalities=("image", "imu")
    )
    return out


class Runner:
    """Starts the toy align run (image and IMU, fp32, 12 steps) in a run directory."""

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
        given = {**fixed, **{key.replace("__", "."): value for key, value in keys.items()}}
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


@pytest.fixture(scope="module")
def runner(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(toy, tmp_path_factory.mktemp("runs"))


def deepspeed_launcher() -> list[str]:
    """`deepspeed` for two CPU ranks. It passes no signals to them: a `stop` file does."""
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_accelerators",
        "2",
        "--master_port",
        str(find_free_port()),
    ]
    return [*command, "--module", "onellm_dist.train"]


@pytest.fixture(scope="module")
def two(runner: Runner) -> str:
    """Two ranks under the deepspeed launcher, ZeRO-3, never stopped."""
    code, output = runner.run("two", launcher=deepspeed_launcher())
    assert code == 0, output
    return "two"


def trainable_state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
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


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_metrics_have_every_step_and_field(runner: Runner, two: str) -> None:
    lines = runner.metrics(two)
    assert [line["step"] for line in lines] == list(range(STEPS))
    wanted = {
        "step",
        "loss",
        "loss_by_modality",
        "lr",
        "grad_norm",
        "samples",
        "global_valid_tokens",
        "tokens",
        "padding_fraction",
        "tokens_per_second",
        "data_wait_fraction",
        "mfu",
        "sample_digest",
    }
    assert wanted <= lines[0].keys()
    assert all(
        line["samples"] == BATCH and line["loss"] > 0 and len(line["sample_digest"]) == 64
        for line in lines
    )
    assert set().union(*(line["loss_by_modality"] for line in lines)) == {"image", "imu"}
    mean = sum(line["loss_by_modality"].get(m, 0) for line in lines for m in ("image", "imu")) / (
        2 * STEPS
    )
    assert 1 < mean < 10
    assert runner.exit(two)["status"] == "done" and runner.exit(two)["steps_done"] == STEPS
    assert list((runner.out / two / "tensorboard").iterdir())


@pytest.mark.parametrize(("ranks", "zero"), [(1, "cpu"), (4, "zero2")])
def test_one_and_four_ranks_see_the_same_samples_and_losses(
    runner: Runner, two: str, ranks: int, zero: str
) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=4",
        "-m",
        "onellm_dist.train",
    ]
    if ranks == 4:
        code, output = runner.run("ranks4", 4, torchrun, engine__config=zero)
    else:
        code, output = runner.fork("ranks1", 1, engine__config=zero)
    assert code == 0, output
    for one, other in zip(runner.metrics(two), runner.metrics(f"ranks{ranks}"), strict=True):
        assert one["sample_digest"] == other["sample_digest"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


def test_align_moves_what_trains_and_nothing_else(runner: Runner, two: str) -> None:
    from onellm_dist.model.presets import load_model

    start, _ = load_model(path=None, preset="toy", seed=0)
    before, after = start.state_dict(), exported(runner.out / two)
    assert after.keys() <= before.keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    others = {
        f"{room}.{name}."
        for room in ("tokenizers", "projectors")
        for name in start.config.modalities
        if name not in ("image", "imu")
    }
    trains = {
        n
        for n in after
        if n.startswith(("tokenizers.", "projectors.", "upm.")) and not n.startswith(tuple(others))
    }
    assert moved == trains


def test_the_exported_model_loads_and_the_next_stage_trains_the_llm(
    runner: Runner, two: str
) -> None:
    keys: dict[str, Any] = {
        "train__stage": "tune",
        "model__path": runner.out / two / "model",
        "train__steps": 2,
        "data__text_format": "conversation",
        "data__max_text_tokens": 200,
    }
    code, output = runner.fork("tuned", 1, **keys)
    assert code == 0, output
    before, after = exported(runner.out / two), exported(runner.out / "tuned")
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in after if name.startswith("llm.")}


def test_killed_runs_resume_bit_identically(runner: Runner, two: str) -> None:
    """First the launcher is killed with everything, then one rank alone; a third start finishes."""
    process = runner.start("killed")
    runner.wait_for_step("killed", EVERY, lambda: get_last_words(process))
    process.kill()
    process.communicate()
    assert not (runner.out / "killed" / "exit.json").exists()

    again = runner.start("killed")
    runner.wait_for_step("killed", 2 * EVERY, lambda: get_last_words(again))
    os.kill(rank_pid(again.pid, 1), signal.SIGKILL)
    output, _ = again.communicate(timeout=TIMEOUT_S)
    assert again.returncode == 1
    assert "rank 1 failed first (ended by SIGKILL" in output
    assert runner.exit("killed")["status"] == "failed"

    code, output = runner.fork("killed")
    assert code == 0, output
    assert "resumes step-" in output
    assert_same_run(runner, "killed", two)


@pytest.mark.parametrize("how", ["file", "signal"])
def test_preempted_runs_resume_bit_identically(runner: Runner, two: str, how: str) -> None:
    name = f"preempted_{how}"
    if how == "file":
        ranks = runner.start_forked(name)
        runner.wait_for_step(name, 1, lambda: ranks.output() if ranks.ended else None)
        (runner.out / name / "stop").touch()
        code, output = ranks.code(TIMEOUT_S), ranks.output()
    else:
        process = runner.start(name)
        runner.wait_for_step(name, 1, lambda: get_last_words(process))
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=TIMEOUT_S)
        code = process.returncode
    assert code == 75, output
    found = runner.exit(name)
    assert found["status"] == "preempted" and found["exit_code"] == 75
    assert ("stop" if how == "file" else "SIGTERM") in found["reason"]
    assert 2 <= found["steps_done"] < STEPS
    assert not (runner.out / name / "stop").exists()
    assert (runner.out / name / "checkpoints" / f"step-{found['steps_done']:08d}").is_dir()

    code, output = runner.fork(name)
    assert code == 0, output
    assert_same_run(runner, name, two)


def assert_same_run(runner: Runner, name: str, reference: str) -> None:
    given, wanted = runner.metrics(name), runner.metrics(reference)
    fields = ("step", "loss", "grad_norm", "lr", "sample_digest", "loss_by_modality")
    assert [[line[f] for f in fields] for line in given] == [
        [line[f] for f in fields] for line in wanted
    ]
    assert same(
        trainable_state(runner.out / name, STEPS), trainable_state(runner.out / reference, STEPS)
    )
    assert same(exported(runner.out / name), exported(runner.out / reference))


def rank_pid(launcher: int, rank: int) -> int:
    """The process of a rank that the local launcher `launcher` started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


def unreadable_sample(toy: Path) -> Callable[[], None]:
    """Overwrite the media of one row of the image dataset; returns what puts it back."""
    from onellm_dist.shards import open_dataset

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


def test_an_unreadable_sample_is_recorded_and_stays_skipped_after_it_is_repaired(
    runner: Runner, two: str
) -> None:
    repair = unreadable_sample(runner.toy)
    try:
        code, output = runner.fork("skipped_sample", 2, train__steps=STEPS)
        assert code == 0, output
        strict_code, strict_output = runner.fork("strict", 2, data__max_skipped_samples=0)
    finally:
        repair()
    lines = [
        json.loads(line)
        for path in (runner.out / "skipped_sample" / "samples").glob("skipped-*")
        for line in path.read_text().splitlines()
    ]
    assert lines and all(
        line["sample_id"].startswith("image/") and line["reason"] for line in lines
    )
    assert [line["sample_digest"] for line in runner.metrics("skipped_sample")] == [
        line["sample_digest"] for line in runner.metrics(two)
    ]
    assert strict_code == 1 and "data.max_skipped_samples is 0" in strict_output
    assert runner.exit("strict")["status"] == "failed"

    # Resume a checkpoint from before the bad sample, with the shard repaired: it stays skipped.
    first = min(line["step"] for line in lines)
    back = runner.out / "skipped_sample" / "checkpoints" / f"step-{(first // EVERY) * EVERY:08d}"
    again: dict[str, Any] = (
        {"checkpoint__resume": back} if first >= EVERY else {"checkpoint__resume": "auto"}
    )
    before = trainable_state(runner.out / "skipped_sample", STEPS)
    code, output = runner.fork("skipped_sample", 2, **again)
    assert code == 0, output
    assert same(trainable_state(runner.out / "skipped_sample", STEPS), before)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train__stepz": 3}, "did you mean train.steps"),
        ({"model__path": "no/such/model"}, "no/such/model"),
        ({"checkpoint__resume": "no/such/step"}, "no complete checkpoint"),
        ({"engine__config": "zero9"}, "zero3_hpz"),
        (
            {"engine__name": "fsdp", "engine__shard_ranks": 3},
            "engine.shard_ranks=3 does not divide",
        ),
        ({"engine__shard_ranks": 2}, "engine.name=fsdp"),
        ({"data__root": "no/such/shards"}, "no/such/shards"),
    ],
)
def test_wrong_usage_is_refused_with_exit_code_two(
    runner: Runner, keys: dict[str, Any], message: str
) -> None:
    name = "wrong_" + next(iter(keys))
    start = runner.run if "train__stepz" in keys else runner.fork
    code, output = start(name, 1, **keys)
    assert code == 2, output
    assert message in output
    assert "Traceback" not in output
    assert runner.exit(name)["status"] == "usage"
    assert not (runner.out / name / "checkpoints").exists()
