"""Stage I of a small model, ZeRO-3, under a real Slurm of two nodes: every starter and scenario."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_onellm import get_small_keys

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.launch.slurm.attempts import read_attempts
from onellm_dist.testing.slurm_cluster import requirements
from onellm_dist.testing.slurm_cluster.cluster import Cluster
from onellm_dist.testing.slurm_cluster.comparison import compare_runs
from onellm_dist.testing.slurm_cluster.rehearse import format_deepspeed_env, rehearse_command
from onellm_dist.testing.slurm_cluster.running_job import find_training_processes
from onellm_dist.testing.slurm_cluster.scenarios import SCENARIOS
from onellm_dist.testing.slurm_cluster.toy_size import (
    CHECKPOINT_EVERY,
    STEPS,
    TOY_RECIPE,
    build_toy_data,
    make_toy_overrides,
)

MISSING = requirements.find_missing(ssh=True)
needs_slurm = pytest.mark.skipif(bool(MISSING), reason=f"no throw-away Slurm here: {MISSING}")
TIMEOUT_S = 800


def list_small_keys() -> list[str]:
    """A smaller model than toy size, as key=value."""
    return [f"{key.replace('__', '.')}={value}" for key, value in get_small_keys().items()]


def make_slug(scenario: str) -> str:
    return scenario.lower().replace(" ", "_")


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Where `onellm rehearse` (srun, one rank a node) left its runs, and its exit code."""
    out = tmp_path_factory.mktemp("rehearsal")
    keys = list_small_keys()
    return out, rehearse_command(
        TOY_RECIPE, keys, nodes=2, ranks_per_node=1, starter="srun", out=out
    )


@needs_slurm
@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=make_slug)
def test_the_run_ends_with_the_samples_and_losses_of_the_clean_run(
    rehearsed: tuple[Path, int], scenario: str
) -> None:
    out, code = rehearsed
    assert code == 0
    found = compare_runs(out / make_slug(scenario), out / "clean_run")
    assert (found.steps, found.same_samples, found.same_losses) == (STEPS, True, True)
    starts = read_attempts(out / make_slug(scenario))
    assert starts[-1].status == "done" and len(starts) == (1 if scenario == "clean run" else 2)
    first = starts[0]
    if scenario in ("preemption", "other node count"):  # a long grace period: no step is lost
        assert (first.status, first.action) == (
            "preempted",
            "requeue",
        ) and first.checkpoint == first.steps_done
    elif scenario != "clean run":
        assert (
            first.status in ("failed", "lost")
            and (first.steps_done or 0) - (first.checkpoint or 0) <= CHECKPOINT_EVERY
        )
    assert [len(a.nodes) for a in starts] == {"clean run": [2], "other node count": [2, 1]}.get(
        scenario, [2, 2]
    )


@needs_slurm
@pytest.mark.slow
@pytest.mark.parametrize("starter", [pytest.param("torchrun", marks=pytest.mark.soak), "deepspeed"])
def test_the_other_ways_of_starting_run_the_same(
    rehearsed: tuple[Path, int], starter: str, tmp_path: Path
) -> None:
    out, _ = rehearsed
    keys = [f"data.root={out / 'toy'}", "train.steps=4", *list_small_keys()]
    assert (
        rehearse_command(
            TOY_RECIPE,
            keys,
            nodes=2,
            ranks_per_node=1,
            starter=starter,
            out=tmp_path,
            only=["clean run"],
        )
        == 0
    )
    check_first_steps(tmp_path / "clean_run", out / "clean_run")


def check_first_steps(run: Path, undisturbed: Path) -> None:
    """Check that the run's four steps are the undisturbed run's first four."""
    lines = (undisturbed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.parent / "beginning").mkdir()
    (run.parent / "beginning" / "metrics.jsonl").write_text("".join(lines[:4]))
    found = compare_runs(run, run.parent / "beginning")
    assert (found.steps, found.same_samples, found.same_losses) == (4, True, True)
    engine = yaml.safe_load((run / "config.yaml").read_text())["engine"]
    assert (
        engine["config"].endswith("cpu") and engine["name"] == "deepspeed"
    )  # ds_configs/cpu.json is ZeRO-3


@needs_slurm
@pytest.mark.slow
def test_the_plain_deepspeed_line_of_the_readme_works_over_pdsh(
    rehearsed: tuple[Path, int], tmp_path: Path
) -> None:
    """The command runs on one of two hosts, with a hostfile and without Slurm."""
    out, _ = rehearsed
    keys = [
        *make_toy_overrides(TOY_RECIPE, [], ranks=2, data=out / "toy"),
        *list_small_keys(),
        "train.steps=4",
        f"run.dir={tmp_path / 'run'}",
    ]
    (tmp_path / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
    with Cluster(2, ssh=True) as cluster:
        cluster.env |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        (tmp_path / ".deepspeed_env").write_text(format_deepspeed_env(cluster))
        line = shlex.join(
            [
                "deepspeed",
                "--hostfile",
                "hostfile",
                "--module",
                "onellm_dist.train",
                str(TOY_RECIPE),
                *keys,
            ]
        )
        command = cluster.enter_node("n1", ["bash", "-c", f"cd {tmp_path} && {line}"])
        done = subprocess.run(
            command, env=cluster.env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    check_first_steps(tmp_path / "run", out / "clean_run")


@needs_slurm
@pytest.mark.slow
def test_an_interrupted_rehearsal_leaves_nothing_running(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "onellm_dist.cli",
        "rehearse",
        "--ranks-per-node",
        "1",
        "--out",
        str(out),
    ]
    # If a shell runs the tests in the background, its children ignore Ctrl-C otherwise.
    with_sigint = ["env", "--default-signal=INT", *command]
    process = subprocess.Popen(with_sigint, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    while not (ranks := list_training(out)):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) != 0
    deadline = time.monotonic() + 20
    while (left := list_training(out)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ranks and not left


def list_training(out: Path) -> list[int]:
    """Processes that name a run directory below `out`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"run.dir={out}".encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def test_wrong_arguments_are_refused_before_anything_starts(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "nodes": 2,
        "ranks_per_node": 1,
        "starter": "srun",
        "out": tmp_path / "out",
    }
    for recipe, keys, only in (
        (TOY_RECIPE, ["train.stepz=1"], []),
        (Path("no_such"), [], []),
        (TOY_RECIPE, [], ["earthquake"]),
    ):
        with pytest.raises(UsageError):
            rehearse_command(recipe, keys, only=only, **options)
    assert not (tmp_path / "out").exists()


def test_a_machine_without_slurm_is_refused_before_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "_PATH", str(tmp_path))
    earlier = tmp_path / "out" / "clean_run"
    earlier.mkdir(parents=True)
    with pytest.raises(OneLLMError, match="no throw-away Slurm"):
        rehearse_command(
            TOY_RECIPE, [], nodes=2, ranks_per_node=1, starter="srun", out=tmp_path / "out"
        )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [
        "clean_run"
    ] and earlier.is_dir()


def test_unfinished_toy_data_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "toy"
    keys = make_toy_overrides(TOY_RECIPE, [], ranks=2, data=folder)
    codes = iter([1, 0])

    def build(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        target = Path(command[command.index("toyworld") + 1])
        assert not target.exists()
        (target / "image").mkdir(parents=True)
        return subprocess.CompletedProcess(command, next(codes), "", "cut short")

    monkeypatch.setattr("onellm_dist.testing.slurm_cluster.toy_size.subprocess.run", build)
    with pytest.raises(OneLLMError, match="cut short"):
        build_toy_data(TOY_RECIPE, keys, folder)
    assert not folder.exists()
    build_toy_data(TOY_RECIPE, keys, folder)
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


@pytest.mark.parametrize(
    "recipe", ["stage1_image", "stage2_video_audio_point", "stage3_all", "tune", "toy/align_all"]
)
def test_every_recipe_comes_down_to_toy_size(recipe: str, tmp_path: Path) -> None:
    from onellm_dist.config.load import load_config

    config = load_config(
        Path(recipe), make_toy_overrides(Path(recipe), ["optim.lr=0.5"], ranks=4, data=tmp_path)
    )
    assert (config.model.preset, config.model.path, config.data.global_batch, config.optim.lr) == (
        "toy",
        None,
        8,
        0.5,
    )
    assert config.train.stage == load_config(Path(recipe)).train.stage


@needs_slurm
@pytest.mark.soak
@pytest.mark.parametrize("starter", ["srun", "torchrun", "deepspeed"])
def test_every_scenario_with_two_ranks_a_node(starter: str, tmp_path: Path) -> None:
    assert (
        rehearse_command(TOY_RECIPE, [], nodes=2, ranks_per_node=2, starter=starter, out=tmp_path)
        == 0
    )


@pytest.mark.parametrize(
    ("words", "is_rank"),
    [(["onellm_dist.train", "run.dir=/x/deepspeed"], True), (["srun", "onellm_dist.train"], False)],
)
def test_a_rank_is_distinguished_from_its_launcher_whatever_its_folder_is_called(
    words: list[str], is_rank: bool
) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(60)", *words]
    process = subprocess.Popen(command, env={**os.environ, "RANK": "0"})
    try:
        deadline = time.monotonic() + 30
        while Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[1:2] != [
            b"-c"
        ]:  # the fork is not yet that program
            assert time.monotonic() < deadline
        assert find_training_processes([process.pid]) == (
            [(process.pid, os.getpid())] if is_rank else []
        )
    finally:
        process.kill()
        process.wait()
