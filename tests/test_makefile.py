"""The Makefile's targets, checked without running them."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_clean_leaves_what_users_made() -> None:
    """The shipped recipes write to runs/, the environment takes minutes to make."""
    done = subprocess.run(
        ["make", "--dry-run", "clean"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    removed = done.stdout.split()
    assert "demo_run" in removed and not {"runs", "runs/", ".venv"} & set(removed)


def test_the_docs_are_built_strictly_and_show_their_warnings() -> None:
    """With --quiet, mkdocs counts no warning: --strict then lets dead links pass."""
    done = subprocess.run(
        ["make", "--dry-run", "docs"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    (command,) = [line for line in done.stdout.splitlines() if "mkdocs build" in line]
    words = command.split("#")[0].split()
    assert "--strict" in words and not {"--quiet", "-q"} & set(words)
