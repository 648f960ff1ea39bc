"""Runs survive kills at random moments and in a save, under ZeRO-3."""

from __future__ import annotations

import random
import time

import pytest
from survival_runs import (
    EVERY,
    STEPS,
    Runs,
    identical,
    make_runs,
    same_stream,
    update_gap,
)
from zygote import Start

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("toy"), tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def two(runs: Runs) -> str:
    """Two ranks, never interrupted."""
    runs.done("two")
    return "two"


def kill_at_random(runs: Runs, name: str, start: Start, generator: random.Random) -> None:
    """SIGKILL to every rank at a random moment of its next steps, or during a save."""
    before = runs.steps_done(name)
    ahead = generator.randint(1, EVERY + 1)
    runs.wait_until(start, lambda: runs.steps_done(name) >= min(before + ahead, STEPS - 1))
    if generator.random() < 0.5:
        folder = runs.out / name / "checkpoints"
        runs.wait_until(
            start, lambda: runs.steps_done(name) >= STEPS - 1 or any(folder.glob(".step-*.partial"))
        )
    else:
        time.sleep(generator.random() * 0.3)
    start.kill()


def kill_often(runs: Runs, name: str, kills: int, seed: int, world_sizes: list[int]) -> None:
    """Start, kill, start ... with the world sizes in turn, then let it finish.

    No kill loses a complete checkpoint.
    """
    generator = random.Random(seed)
    slow = {"slow_writes": 0.2, "slow_steps": 0.1}  # so that a kill finds it at work
    for number in range(kills):
        complete = set(runs.checkpoints(name))
        start = runs.start(name, world_sizes[number % len(world_sizes)], slow)
        kill_at_random(runs, name, start, generator)
        assert complete <= set(runs.checkpoints(name)), start.output()
    runs.done(name, world_sizes[kills % len(world_sizes)])
    starts = runs.events(name, "start")
    assert len(starts) >= 1 and starts[-1]["world_size"] == world_sizes[kills % len(world_sizes)]


def test_killed_at_random_moments_the_run_ends_bit_identical(runs: Runs, two: str) -> None:
    kill_often(runs, "killed", 3, 11, [2])
    identical(runs, "killed", two)


def test_killed_and_resumed_at_other_world_sizes_the_run_ends_with_the_same_update(
    runs: Runs, two: str
) -> None:
    kill_often(runs, "resized", 2, 12, [1, 3, 2])
    same_stream(runs, "resized", two)
    assert update_gap(runs, "resized", two) < 1e-3


@pytest.mark.soak
def test_twenty_kills(runs: Runs, two: str) -> None:
    kill_often(runs, "twenty_same", 10, 13, [2])
    identical(runs, "twenty_same", two)
    kill_often(runs, "twenty", 10, 14, [2, 1, 4, 3])
    same_stream(runs, "twenty", two)
    assert update_gap(runs, "twenty", two) < 1e-3


def test_a_kill_in_a_save_loses_no_complete_checkpoint_and_leaves_none_that_loads(
    runs: Runs, two: str
) -> None:
    folder = runs.out / "in_save" / "checkpoints"
    start = runs.start("in_save", plant={"slow_writes": 30.0})
    runs.wait_until(start, lambda: any(folder.glob(f".step-{EVERY:08d}.partial")))
    runs.wait_until(
        start, lambda: runs.steps_done("in_save") > EVERY
    )  # training continues meanwhile
    start.kill()
    assert runs.checkpoints("in_save") == []
    runs.done("in_save")
    assert runs.events("in_save", "start")[-1]["first_step"] == 0
    assert not list(folder.glob(".step-*"))
    identical(runs, "in_save", two)
