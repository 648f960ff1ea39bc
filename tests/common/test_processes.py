"""Processes that we start: nothing in the working directory takes the place of a module."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from onellm_dist.common.plugins import import_user_module
from onellm_dist.common.processes import (
    get_cpu_seconds,
    is_asleep,
    make_module_command,
    make_safe_environment,
)

SHADOWS = ("random.py", "json.py", "types.py", "torch/__init__.py", "yaml.py", "onellm_dist.py")


@pytest.fixture
def shadows(tmp_path: Path) -> Path:
    """A working directory in which importing anything fails."""
    for name in SHADOWS:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise RuntimeError('{name} was imported')")
    return tmp_path


def without_safe_path() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}


@pytest.mark.seconds
def test_a_module_that_we_start_is_not_shadowed(shadows: Path) -> None:
    command = make_module_command("onellm_dist.train", "--help")
    for env in (without_safe_path(), make_safe_environment()):
        done = subprocess.run(
            command, cwd=shadows, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and "usage" in done.stdout, done.stderr


@pytest.mark.seconds
def test_arguments_and_grandchildren_are_safe_too(shadows: Path) -> None:
    child = (
        "import subprocess, sys\nsys.exit(subprocess.call([sys.executable, '-c', 'import json']))"
    )
    if sys.version_info >= (3, 11):
        env = make_safe_environment()
        subprocess.run([sys.executable, "-c", child], cwd=shadows, env=env, check=True)
    command = make_module_command("onellm_dist.train", "no such $recipe", "a=b c")
    done = subprocess.run(
        command, cwd=shadows, env=without_safe_path(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "no such $recipe" in done.stderr


def test_python_m_finds_the_standard_library_first(shadows: Path) -> None:
    """What the deepspeed launcher and torchrun do; Python's own start must get that far."""
    for name in ("types.py", "onellm_dist.py"):
        (shadows / name).unlink()
    done = subprocess.run(
        [sys.executable, "-m", "onellm_dist.train", "--help"],
        cwd=shadows,
        env=without_safe_path(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_a_module_that_a_recipe_names_is_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_loss.py").write_text("VALUE = 3")
    (tmp_path / "json.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert import_user_module("my_own_loss").VALUE == 3
    assert sys.path[-1] == str(tmp_path)


def test_what_another_process_does() -> None:
    spin = [sys.executable, "-c", "while True: pass"]
    with subprocess.Popen(spin) as busy, subprocess.Popen(["sleep", "60"]) as idle:
        deadline = time.monotonic() + 30
        while get_cpu_seconds(busy.pid) < 0.3 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert get_cpu_seconds(busy.pid) > get_cpu_seconds(idle.pid)
        assert is_asleep(idle.pid) and not is_asleep(busy.pid)
        for process in (busy, idle):
            process.send_signal(signal.SIGKILL)
    assert not is_asleep(busy.pid)
