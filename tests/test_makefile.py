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
