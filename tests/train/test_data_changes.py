"""Runs whose data changes or is watched: a new data phase at a resume, validation on a split."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from small_onellm import get_small_model
from zygote import get_zygote

from onellm_dist.shards.sources.toyworld.build import build_toyworld

pytestmark = pytest.mark.slow
ZERO2 = "engine.config=zero2"
"""It takes two thirds of the time of ZeRO-3."""


def start(
    toy: Path, run_dir: Path, steps: int, weights: tuple[int, int], *more: str, ranks: int = 2
) -> tuple[int, str]:
    mixture = [
        f"{{path: {n}, weight: {w}}}" for n, w in zip(("image", "imu"), weights, strict=True)
    ]
    overrides = [
        f"data.root={toy}",
        f"run.dir={run_dir}",
        f"train.steps={steps}",
        f"data.mixture=[{', '.join(mixture)}]",
        "data.global_batch=4",
        "data.workers=1",
        "data.validation={split: test_seen, samples: 5, every: 2}",
        "optim.schedule=constant",
        "checkpoint.every=2",
        f"model.path={get_small_model()}",
        "model.preset=",
        *more,
    ]
    started = get_zygote().start(ranks, overrides)
    return started.code(800), started.output()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_mixture_is_changed_mid_run_and_a_split_is_validated(tmp_path: Path) -> None:
    toy, run_dir = tmp_path / "toy", tmp_path / "run"
    build_toyworld(
        toy, seed=0, train_per_modality=24, test_per_modality=4, modalities=("image", "imu")
    )
    code, output = start(toy, run_dir, 2, (1, 1), ZERO2)
    assert code == 0, output

    code, output = start(toy, run_dir, 4, (3, 1), ZERO2)
    assert code == 2
    assert "data.mixture was 1/2 image + 1/2 imu and is 3/4 image + 1/4 imu" in output
    assert "data.new_phase=true" in output
    assert len(lines(run_dir / "metrics.jsonl")) == 2, "a refused start leaves the run as it was"

    new = (ZERO2, "data.new_phase=true")
    for steps, ranks in (
        (4, 1),
        (6, 2),
    ):  # the second start resumes within the new data_phase, at another number of ranks
        code, output = start(toy, run_dir, steps, (3, 1), *new, ranks=ranks)
        assert code == 0, output
    data_phases = json.loads((run_dir / "samples" / "data_phases.json").read_text())
    assert [(s["start"], list(s["counts"].values())) for s in data_phases] == [
        (0, [1, 1]),
        (2, [3, 1]),
    ]
    metrics = lines(run_dir / "metrics.jsonl")
    assert [line["step"] for line in metrics] == list(range(6))
    assert len({line["sample_digest"] for line in metrics}) == 6
    assert [
        event["step"] for event in lines(run_dir / "events.jsonl") if event["event"] == "data_phase"
    ] == [2]

    validated = lines(run_dir / "validation.jsonl")
    assert [line["steps_done"] for line in validated] == [2, 4, 6]
    assert {line["samples"] for line in validated} == {5}
    assert validated[1]["sample_digest"] == validated[2]["sample_digest"], (
        "one set at one rank and at two"
    )
    assert all(0 < line["loss"] < 20 for line in validated)
    assert set(validated[-1]["loss_by_modality"]) == {"image", "imu"}


def test_validation_does_not_touch_training_or_depend_on_the_number_of_ranks(
    tmp_path: Path,
) -> None:
    toy, often = tmp_path / "toy", "data.validation={split: test_seen, samples: 5, every: 1}"
    build_toyworld(
        toy, seed=0, train_per_modality=12, test_per_modality=4, modalities=("image", "imu")
    )
    found = {}
    for name, ranks, more in (
        ("with", 2, (often,)),
        ("without", 2, ("data.validation=",)),
        ("alone", 1, (often,)),
    ):
        code, output = start(
            toy, tmp_path / name, 3, (1, 1), "train.precision=fp32", *more, ranks=ranks
        )
        assert code == 0, output
        found[name] = [line["loss"] for line in lines(tmp_path / name / "metrics.jsonl")]
    assert found["with"] == found["without"]
    losses = [lines(tmp_path / name / "validation.jsonl")[-1]["loss"] for name in ("with", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert not (tmp_path / "without" / "validation.jsonl").exists()


def test_a_rank_that_a_signal_ends_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What all tests with forked ranks rely on."""
    script, zygote = tmp_path / "rank.py", get_zygote()
    script.write_text(
        "import os, sys\nif os.environ['RANK'] == sys.argv[1]: os.kill(os.getpid(), 9)\n"
    )
    failed = zygote.start(2, [], script=[str(script), "1"])
    assert failed.code(60) == -9 and failed.wait() == [0, -9]
    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", lambda *_: pytest.fail("its ranks have ended"))
        failed.kill()
    # The system gives the pids of processes again: codes are known by other numbers.
    assert not set(zygote._codes) & set(failed.pids)
    script.write_text("import os, sys\nsys.exit(int(os.environ['RANK']) * int(sys.argv[1]))\n")
    assert zygote.start(2, [], script=[str(script), "3"]).wait(60) == [0, 3]
    assert zygote.start(2, [], script=[str(script), "0"]).code(60) == 0
    assert failed.wait() == [0, -9]
