"""Packages that a test installs for itself: skipped where no index is reached, never otherwise."""

from __future__ import annotations

import re
import subprocess

import pytest

_NO_INDEX = re.compile(
    r"Retrying \(Retry|NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError"
)
"""What pip says where it reaches no index; a version that does not exist says none of it."""


def install(command: list[str], timeout: float = 1800) -> None:
    """Run pip's command; the test is skipped without a network, and fails at any other fault."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if not done.returncode:
        return
    said = done.stdout + done.stderr
    if _NO_INDEX.search(said):
        pytest.skip(f"no package index is reached here: {said[-300:]}")
    pytest.fail(f"{' '.join(command)} failed: {said[-2000:]}")
