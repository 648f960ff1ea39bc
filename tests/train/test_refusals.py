"""Starts that are refused change nothing; starts that change something say what."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from forked_python import get_programs
from survival_runs import Runs
from zygote import get_zygote

from onellm_dist.common.processes import make_module_command
from onellm_dist.common.run_files import LOCK, REFUSALS
from onellm_dist.shards.sources.toyworld.build import build_toyworld

pytestmark = pytest.mark.slow
DONE: dict[str, Any] = {"train__steps": 4, "checkpoint__every": 2}
PRESET: dict[str, Any] = {**DONE, "model__path": "", "model__preset": "toy"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    toy, out = tmp_path_factory.mktemp("toy"), tmp_path_factory.mktemp("refusals")
    build_toyworld(
        toy, seed=0, train_per_modality=16, test_per_modality=2, modalities=("image", "imu")
    )
    return Runs(toy, out, get_zygote(), engine__config="zero2")


@pytest.fixture(scope="module")
def done(runs: Runs) -> str:
    """A run that is over; its model is a preset, whose weights the seed gives."""
    runs.done("done", 1, **PRESET)
    return "done"


def digest(folder: Path) -> str:
    """Names, bytes and times of everything but the log of refusals."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.name == REFUSALS:
            continue
        found.update(f"{path.relative_to(folder)} {path.lstat().st_mtime_ns}\n".encode())
        if path.is_file():
            found.update(path.read_bytes())
    return found.hexdigest()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "parameters": (
        {
            "train__steps": 8,
            "data__mixture": "[{path: imu}, {path: image}]",
            "data__new_phase": True,
        },
        "other trainable parameters",
    ),
    "mixture": ({"data__global_batch": 2, "train__steps": 8}, "data.global_batch was 4 and is 2"),
    "optimizer": ({"optim__name": "sgd", "train__steps": 8}, "optim.name=adamw"),
    "steps": ({"train__steps": 3}, "has 4 steps done"),
    "seed": ({"run__seed": 5, "train__steps": 8}, "run.seed was 0, now 5"),
    "length": ({"data__pack_llm_tokens": 33, "train__steps": 8}, "data.pack_llm_tokens is 33"),
    "recipe": (
        {"train__stepz": 8, "model__path": "/no/model", "model__preset": ""},
        "2 problems",
    ),
    "list": ({"data__exclude": "/no/list", "train__steps": 8}, "data.exclude=/no/list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_resume_leaves_the_run_as_it_was(runs: Runs, done: str, name: str) -> None:
    keys, says = REFUSED[name]
    folder = runs.out / done
    # What a killed start leaves, and what was meant for another start, is not tidied away either.
    (folder / "checkpoints" / ".step-00000009.partial").mkdir(exist_ok=True)
    (folder / "stop").touch()
    before, refusals = digest(folder), len(runs.lines(done, REFUSALS))
    ranks = 2 if name in ("parameters", "recipe") else 1
    start = runs.start(done, ranks, **{**PRESET, **keys})
    assert start.wait() == [2] * ranks, start.output()
    assert says in start.output() and "Traceback" not in start.output()
    assert digest(folder) == before
    lines = runs.lines(done, REFUSALS)[refusals:]
    assert [line["status"] for line in lines] == ["usage"], "one line, whichever rank was first"
    assert says in lines[0]["reason"]
    assert runs.exit(done)["status"] == "done", "that of the start that ran"


def test_a_second_start_is_refused_and_the_first_one_keeps_its_exit_file(runs: Runs) -> None:
    name, plant = "twice", {"impatient": 0.2, "slow_steps": 0.5}
    first = runs.start(name, 1, plant, train__steps=40)
    runs.wait_until(first, lambda: runs.steps_done(name) >= 1)
    hangs = runs.out / name / "hangs"
    hangs.mkdir()
    second = runs.start(name, 2, plant, train__steps=40)
    assert second.wait() == [1, 1], second.output()
    assert "in use by another start" in second.output()
    assert hangs.is_dir() and not (runs.out / name / "exit.json").exists()
    wrong = runs.start(name, 1, plant, train__steps=0)
    assert wrong.wait() == [2]
    assert not (runs.out / name / "exit.json").exists() and not first.ended
    (runs.out / name / "stop").touch()
    assert first.wait() == [75]
    assert runs.exit(name)["status"] == "preempted"
    assert [line["status"] for line in runs.lines(name, REFUSALS)] == ["failed", "usage"]
    assert len(runs.events(name, "start")) == 1


def test_a_refused_first_start_says_so_in_exit_json_and_the_next_one_clears_it(runs: Runs) -> None:
    start = runs.start("fresh", 1, data__pack_llm_tokens=33, **DONE)
    assert start.wait() == [2]
    assert runs.exit("fresh")["status"] == "usage"
    names = {path.name for path in (runs.out / "fresh").iterdir()}
    assert names == {"exit.json", REFUSALS, LOCK}
    runs.done("fresh", 1, **DONE)
    assert runs.exit("fresh")["status"] == "done"


def test_changed_keys_and_a_jump_are_shown_and_kept(runs: Runs) -> None:
    name, keys = "changed", {**DONE, "optim__schedule": "cosine", "optim__min_lr": 0}
    runs.done(name, 1, **keys)
    start = runs.start(name, 1, **{**keys, "train__steps": 6})
    start.done()
    (event,) = runs.events(name, "config_changed")
    assert event["step"] == 4
    assert event["changes"] == [{"key": "train.steps", "old": 4, "new": 6}]
    (jump,) = runs.events(name, "learning_rate_jump")
    assert jump["old"] == 0 and jump["new"] == pytest.approx(2.5e-4)
    assert "train.steps: 4 -> 6" in start.output()
    assert "WARNING: the learning rate jumps at step 4" in start.output()
    runs.done(name, 1, **{**keys, "train__steps": 6})
    assert len(runs.events(name, "config_changed")) == 1, "nothing changed"
    (line,) = runs.lines(name, "config_history.jsonl")
    assert (line["first_step"], line["changes"]) == (4, event["changes"])


def test_an_excluded_sample_is_left_out_from_the_next_start_on(runs: Runs) -> None:
    from onellm_dist.train.sample_log.exclude import exclude_command
    from onellm_dist.train.sample_log.stream import RunStream

    name = "excluded"
    runs.done("reference", 1, **{**DONE, "train__steps": 8})
    runs.done(name, 1, **DONE)
    keys = {**DONE, "train__steps": 8}
    uses = [use for step in range(4) for use in RunStream(runs.out / name).list_samples(step)]
    sample = uses[5].sample
    exclude_command(runs.out / name, [uses[5].sample_id])
    runs.done(name, 2, **keys)
    expected = [
        (use.step, use.sample_id)
        for use in RunStream(runs.out / name).list_uses(sample)
        if use.step >= 4
    ]
    listed = [
        (line["step"], line["sample_id"])
        for path in (runs.out / name / "samples").glob("listed-*.jsonl")
        for line in map(json.loads, path.read_text().splitlines())
    ]
    assert expected and sorted(listed) == expected
    assert [line["sample_digest"] for line in runs.lines(name, "metrics.jsonl")] == [
        line["sample_digest"] for line in runs.lines("reference", "metrics.jsonl")
    ], "every sample keeps its place"
    (event,) = runs.events(name, "exclusions")
    assert (event["entries"], event["other_datasets"], event["unmatched"]) == (1, {}, [])


def listed(runs: Runs, name: str) -> set[tuple[int, str]]:
    """(step, sample id) of every use that a list left out of a run."""
    return {
        (line["step"], line["sample_id"])
        for path in (runs.out / name / "samples").glob("listed-*.jsonl")
        for line in map(json.loads, path.read_text().splitlines())
    }


def test_another_run_that_continues_a_checkpoint_leaves_the_same_samples_out(runs: Runs) -> None:
    """First, then two ways on: the run itself, and another one, which is stopped midway."""
    from onellm_dist.train.sample_log.exclude import exclude_command
    from onellm_dist.train.sample_log.stream import RunStream

    first, second = "inherit_first", "inherit_second"
    (runs.out / first).mkdir()
    by_hand = ["imu/train-000000/imu_train_000003", "imo/a/b", "other/x"]
    (runs.out / first / "exclude.txt").write_text("# by hand\n" + "\n".join(by_hand))
    runs.done(first, 1, **DONE)
    uses = [use for step in range(4) for use in RunStream(runs.out / first).list_samples(step)]
    exclude_command(runs.out / first, [uses[5].sample_id])  # after its checkpoint
    keys: dict[str, Any] = {"train__steps": 8, "checkpoint__every": 2}
    source = runs.out / first / "checkpoints" / "step-00000004"
    (runs.out / second).mkdir()
    (runs.out / second / "exclude.txt").write_text("imu/train-000099\n")
    start = runs.start(second, 1, checkpoint__resume=source, **{**keys, "train__steps": 6})
    start.done()
    assert "2 of them name datasets that this run does not read" in start.output()
    assert "imo (did you mean imu?)" in start.output()
    (event,) = runs.events(second, "exclusions")
    assert event["entries"] == 5 and event["other_datasets"] == {"imo": 1, "other": 1}
    assert event["unmatched"] == ["imu/train-000099"]
    runs.done(second, 1, **keys)
    runs.done(first, 1, **keys)
    assert listed(runs, second) == listed(runs, first)
    left_out = {name.rpartition("@")[0] for step, name in listed(runs, first) if step >= 4}
    assert left_out == {by_hand[0], uses[5].sample.name}
    assert (runs.out / second / "exclude.txt").read_text().splitlines() == [
        "imu/train-000099",
        *by_hand,
        uses[5].sample.name,
    ]
    continued = [line for line in runs.lines(first, "metrics.jsonl") if line["step"] >= 4]
    for field in ("sample_digest", "loss", "grad_norm"):
        assert [line[field] for line in runs.lines(second, "metrics.jsonl")] == [
            line[field] for line in continued
        ], field


def test_a_run_of_which_nothing_can_be_read_fails_at_its_first_step(runs: Runs) -> None:
    start = runs.start("unreadable", 1, {"unreadable": "imu"}, **DONE)
    assert start.wait() == [1]
    assert (
        "none of its 4 samples could be read: unreadable imu: RuntimeError: planted"
        in start.output()
    )
    found = runs.exit("unreadable")
    assert found["status"] == "failed" and "step 0" in found["reason"]
    assert runs.steps_done("unreadable") == 0 and not (runs.out / "unreadable" / "model").exists()


def test_a_modality_of_which_nothing_can_be_read_is_a_fault_of_the_library(runs: Runs) -> None:
    keys = {**DONE, "data__mixture": "[{path: imu}, {path: image}]", "train__steps": 20}
    start = runs.start("one_modality", 2, {"unreadable": "imu"}, **keys)
    assert start.wait() == [1, 1]
    assert "no sample of modality imu could be read so far; all fail alike" in start.output()
    assert "a library" in start.output() and 3 <= runs.steps_done("one_modality") <= 4


def test_outputs_that_fail_or_block_do_not_end_a_run(runs: Runs) -> None:
    started = time.monotonic()
    keys = {**DONE, "track__with": "[wandb]"}
    runs.done("outputs", 1, {"blocked_outputs": True}, **keys)
    assert time.monotonic() - started < 120
    assert runs.exit("outputs")["status"] == "done"
    (event,) = runs.events("outputs", "tracker_dropped")
    assert event["problem"].startswith("no answer for")
    assert [line["step"] for line in runs.lines("outputs", "metrics.jsonl")] == [0, 1, 2, 3], (
        "lines that the disk had no room for were written when it had"
    )


def test_local_ranks_that_refuse_their_start_leave_the_run_as_it_was(runs: Runs, done: str) -> None:
    def refuse(name: str, *more: str) -> str:
        overrides = runs.overrides(name, **PRESET)
        command = make_module_command("onellm_dist.train", "toy/align_image", *overrides, *more)
        command[0] = str(get_programs() / "python")
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        found = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=600, check=False
        )
        assert found.returncode == 2, found.stdout + found.stderr
        return found.stdout + found.stderr

    # What an earlier start with a launcher has left.
    log = runs.out / done / "logs" / "rank-1.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("of the start before\n")
    before = digest(runs.out / done)
    two = ("train.steps=8", "launch.ranks=2")
    assert "run.seed was 0, now 5" in refuse(done, *two, "run.seed=5")
    assert digest(runs.out / done) == before
    assert "data.pack_llm_tokens is 33" in refuse("local_fresh", *two, "data.pack_llm_tokens=33")
    names = {path.name for path in (runs.out / "local_fresh").iterdir()}
    assert names == {"exit.json", REFUSALS, LOCK}
