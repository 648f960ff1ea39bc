"""The demo's commands are valid, its sizes keep the toy world's promises, its result is honest."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, UsageError
from onellm_dist.common.logging import configure_logging
from onellm_dist.config.load import load_config
from onellm_dist.evaluation.report import Caption, summarise_captions
from onellm_dist.shards.sources.toyworld import world
from onellm_dist.testing.demo import stages
from onellm_dist.testing.demo.journal import open_journal
from onellm_dist.testing.demo.layout import RUNS, Demo
from onellm_dist.testing.demo.run import get_exit_code, make_stages
from onellm_dist.testing.demo.scale import FULL, QUICK, DemoScale
from onellm_dist.testing.demo.stages import STEP_COUNT, make_training_command
from onellm_dist.testing.demo.toy_clip import ClipPretraining
from onellm_dist.testing.demo.toy_llm import LLMPretraining
from onellm_dist.testing.demo.toy_towers import override

MINUTES = 25


@pytest.mark.parametrize("scale", [QUICK, FULL], ids=["quick", "full"])
def test_every_stage_is_a_recipe_that_is_accepted(scale: DemoScale, tmp_path: Path) -> None:
    demo = Demo(tmp_path, scale, ranks=2)
    sources = []
    for name, run in zip(RUNS, scale.runs, strict=True):
        command = make_training_command(demo, name, run)
        assert command[1:3] == ["--num_accelerators", "2"] and command[5:7] == [
            "--module",
            "onellm_dist.train",
        ]
        config = load_config(Path(command[7]), command[8:])
        assert config.train.steps == run.steps and config.run.dir == demo.run_dir(name)
        assert config.train.stage == ("tune" if name == "tune" else "align")
        assert config.checkpoint.every <= config.train.steps // 2
        sources.append(config.model.path)
        assert {str(entry.path) for entry in config.data.mixture} <= set(world.MODALITIES)
    assert sources == [
        demo.towers,
        demo.model("align_image"),
        demo.model("align_all"),
    ]
    assert set(load_config(Path("toy/align_all")).model.init_from_image) == set(
        world.MODALITIES
    ) - {"image"}


@pytest.mark.parametrize("scale", [QUICK, FULL], ids=["quick", "full"])
def test_sizes_keep_the_promises(scale: DemoScale) -> None:
    assert scale.test >= 100 and set(scale.train) == set(world.MODALITIES)
    override(ClipPretraining(), scale.clip)
    override(LLMPretraining(), scale.llm)


def test_the_quick_demo_is_predicted_to_end_in_time(tmp_path: Path) -> None:
    assert (
        sum(stage.predicted for stage in make_stages(Demo(tmp_path, QUICK, 2), slowdown=1.0))
        < MINUTES * 60
    )


def test_progress_of_training_is_not_taken_from_other_counts() -> None:
    import re

    output = (
        "Counting tokens: 4000/4000 (100%) sample\nLoading weights: 256/256\n"
        "10/160 steps  loss 0.6 (image 0.6)\n"
    )
    assert re.findall(STEP_COUNT, output) == [("10", "160")]


def test_a_resumed_run_begins_at_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it prints its first step: a reader saw 45% go back to 0%."""
    demo, name, shown = Demo(tmp_path, QUICK, ranks=2), RUNS[1], list[float]()
    run = QUICK.runs[1]
    (demo.run_dir(name) / "checkpoints" / f"step-{run.steps // 2:08d}").mkdir(parents=True)
    (demo.run_dir(name) / "model").mkdir()
    (demo.run_dir(name) / "model" / "config.json").write_text("{}")
    code = "import time; print('loading', flush=True); time.sleep(1)"
    command = [sys.executable, "-c", code]
    monkeypatch.setattr(stages, "make_training_command", lambda *_: command)
    table = Mock(show_progress=shown.append)
    stages.train(demo, table, Mock(killed=True), name=name)
    assert len(shown) > 1 and min(shown[:-1]) == max(shown[:-1]) == run.steps // 2 / run.steps


def test_only_a_demo_of_the_same_size_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="not empty"):
        open_journal(tmp_path, full=False)
    begun = open_journal(tmp_path / "new", full=False)
    begun.killed = True
    begun.record_stage("towers", 12.5)
    assert open_journal(tmp_path / "new", full=False) == begun
    with pytest.raises(UsageError, match="holds the quick demo"):
        open_journal(tmp_path / "new", full=True)
    (tmp_path / "new" / "demo.json").write_text('{"full"')
    with pytest.raises(UsageError, match="not a demo's record"):
        open_journal(tmp_path / "new", full=False)


def test_a_model_that_does_not_read_its_input_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logging()
    every = [
        world.make_caption("imu", world.to_attributes("imu", c))
        for c in world.list_combinations("imu")
    ]
    right = [Caption(str(i), "imu", "test_seen", text, text) for i, text in enumerate(every * 2)]
    parrot = [Caption(c.key, "imu", "test_held_out", c.reference, every[0]) for c in right]
    assert get_exit_code(summarise_captions(right, {"imu": every})) == EXIT_DONE
    assert get_exit_code(summarise_captions([*right, *parrot], {"imu": every})) == EXIT_FAILED
    assert "imu (test_held_out)" in capsys.readouterr().err
