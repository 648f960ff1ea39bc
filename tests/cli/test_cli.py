"""The command as a user meets it: help with an example everywhere, short errors, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked_python import get_programs

COMMANDS = [
    "demo",
    "train",
    "report",
    "samples",
    "doctor",
    "launch",
    "plan",
    "rehearse",
    "generate",
    "serve",
    "shards build",
    "shards index",
    "shards verify",
    "shards repair",
    "shards stats",
    "shards preview",
]


def run_onellm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(get_programs() / "onellm"), *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.seconds
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = run_onellm(*command.split(), "--help")
    assert done.returncode == 0
    assert f"onellm {command}" in " ".join(done.stdout.split())
    assert "Example" in done.stdout


def test_help_shows_every_default() -> None:
    """Square brackets are markup to typer: a default in them would be swallowed."""
    shown = " ".join(run_onellm("launch", "--help").stdout.replace("│", " ").split())
    for default in ("pyxis", "24:00:00", "300", "5", "srun"):
        assert f"[default: {default}]" in shown


@pytest.mark.seconds
def test_the_shell_can_complete_commands() -> None:
    assert "--install-completion" in run_onellm("--help").stdout
    command = Path(sys.executable).parent / "onellm"  # the real one
    typed = {"_ONELLM_COMPLETE": "complete_bash", "COMP_WORDS": "onellm generate --im"}
    done = subprocess.run(
        [command],
        env={**os.environ, **typed, "COMP_CWORD": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert {"--image", "--imu"} <= set(done.stdout.split())


@pytest.mark.seconds
def test_generate_has_an_option_for_every_modality() -> None:
    from onellm_dist.modalities import all_modalities

    shown = run_onellm("generate", "--help").stdout
    assert all(f"--{name}" in shown for name in all_modalities())


@pytest.mark.parametrize(
    "arguments",
    [["trai"], ["train"], ["shards", "build"], ["generate"], ["doctor", "a=b"], ["--nope"]],
)
@pytest.mark.seconds
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    assert run_onellm(*arguments).returncode == 2


@pytest.mark.seconds
def test_errors_are_what_why_and_what_to_do(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train: {stage: align, stepz: 3}\n")
    done = run_onellm("train", str(recipe))
    assert done.returncode == 2
    assert "did you mean train.steps?" in done.stderr
    assert "nothing was started" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.seconds
def test_a_missing_model_is_a_usage_error(tmp_path: Path) -> None:
    done = run_onellm("generate", str(tmp_path / "no_model"), "hello")
    assert done.returncode == 2
    assert "no_model" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.seconds
def test_a_narrow_locale_ends_no_command() -> None:
    """An answer with characters that the terminal's encoding lacks is shown, not refused."""
    code = "from onellm_dist.cli import main\nimport sys\nmain(sys.argv[1:])"
    env = {**os.environ, "PYTHONIOENCODING": "iso-8859-1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "\u732b.yaml"],
        env=env,
        capture_output=True,
        text=True,
        encoding="iso-8859-1",
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "\\u732b.yaml" in done.stderr


@pytest.mark.seconds
def test_a_run_directory_that_cannot_be_created_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_onellm(
        "train", "toy/align_image", f"run.dir={tmp_path / 'file' / 'run'}", "launch.ranks=2"
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "cannot be created" in done.stderr
