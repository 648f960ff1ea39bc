"""A task costs one file in the package, or one outside it with an entry point."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from onellm_dist.common.errors import UsageError
from onellm_dist.evaluation.tasks import all_tasks, get_task, registry

BIRDSONG = """
from onellm_dist.evaluation.scorers.exact import measure_strict
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_short

TASK = Task(
    "birdsong", "Birdsong", "Which bird sings.", ("audio",), "test", make_short(), measure_strict,
    max_new_tokens=4,
)
"""


@pytest.fixture(autouse=True)
def fresh() -> None:
    all_tasks.cache_clear()


def test_a_file_in_the_folder_is_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onellm_dist.evaluation.tasks as package

    (tmp_path / "birdsong.py").write_text(BIRDSONG)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "FOLDER", str(tmp_path))
    assert get_task("birdsong").max_new_tokens == 4


def test_another_package_adds_a_task_by_an_entry_point(tmp_path: Path) -> None:
    info = tmp_path / "birds-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: birds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[onellm_dist.tasks]\nbirdsong = birds\n")
    (tmp_path / "birds.py").write_text(BIRDSONG)
    code = "from onellm_dist.evaluation.tasks import all_tasks; print(*all_tasks())"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "birdsong" in done.stdout.split() and len(done.stdout.split()) == 30


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"(?s)'smell'.*onellm_dist\.tasks.*gqa"):
        get_task("smell")
