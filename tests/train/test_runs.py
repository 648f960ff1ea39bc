"""Whole runs of the toy recipe: equal for any launcher, number of ranks and history of stops."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import pytest
import torch
from align_runs import (
    BATCH,
    EVERY,
    STEPS,
    TIMEOUT_S,
    Runner,
    assert_same_run,
    exported,
    get_deepspeed_launcher,
    get_last_words,
    get_rank_pid,
    have_same_values,
    make_runner,
    make_sample_unreadable,
    read_trainable_state,
)
from forked_python import get_programs
from small_onellm import get_small_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return make_runner(tmp_path_factory.mktemp("align"))


@pytest.fixture(scope="module")
def two(runner: Runner) -> str:
    """Two ranks under the deepspeed launcher, ZeRO-3, never stopped."""
    code, output = runner.run("two", launcher=get_deepspeed_launcher())
    assert code == 0, output
    return "two"


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


@pytest.mark.parametrize(
    ("launcher", "ranks", "zero"),
    [("none", 1, "cpu"), ("none", 4, "zero2"), ("torchrun", 2, "zero2")],
)
def test_any_ranks_and_launcher_see_the_same_samples_and_losses(
    runner: Runner, two: str, launcher: str, ranks: int, zero: str
) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        "-m",
        "onellm_dist.train",
    ]
    name = f"{launcher}{ranks}"
    if launcher == "torchrun":
        code, output = runner.run(name, ranks, torchrun, engine__config=zero)
    else:
        code, output = runner.fork(name, ranks, engine__config=zero)
    assert code == 0, output
    for one, other in zip(runner.metrics(two), runner.metrics(name), strict=True):
        assert one["sample_digest"] == other["sample_digest"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


def test_align_moves_what_trains_and_nothing_else(runner: Runner, two: str) -> None:
    from onellm_dist.model.presets import load_model

    start, _ = load_model(path=get_small_model(), preset=None, seed=0)
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
    launcher = [str(get_programs() / "python"), "-m", "onellm_dist.train"]
    process = runner.start("killed", launcher=launcher)
    runner.wait_for_step("killed", EVERY, lambda: get_last_words(process))
    process.kill()
    process.communicate()
    assert not (runner.out / "killed" / "exit.json").exists()

    again = runner.start("killed", launcher=launcher)
    runner.wait_for_step("killed", 2 * EVERY, lambda: get_last_words(again))
    os.kill(get_rank_pid(runner.out / "killed", 1), signal.SIGKILL)
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
        process = runner.start(name, launcher=[sys.executable, "-m", "onellm_dist.train"])
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


def test_an_unreadable_sample_is_recorded_and_stays_skipped_after_it_is_repaired(
    runner: Runner, two: str
) -> None:
    repair = make_sample_unreadable(runner.toy)
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
    before = read_trainable_state(runner.out / "skipped_sample", STEPS)
    code, output = runner.fork("skipped_sample", 2, **again)
    assert code == 0, output
    assert have_same_values(read_trainable_state(runner.out / "skipped_sample", STEPS), before)
