"""Folders of throw-away clusters: each names the process that owns it, so that what a killed one left is found and removed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import psutil

PREFIX = "onellm-slurm-"
OWNER = "owner.json"


def claim_folder() -> Path:
    """A new folder that belongs to this process."""
    root = Path(tempfile.mkdtemp(prefix=PREFIX))
    root.chmod(0o755)  # munge refuses a socket below a folder that others cannot pass
    (root / OWNER).write_text(
        json.dumps({"pid": os.getpid(), "started": psutil.Process().create_time()})
    )
    return root


def remove_stale() -> list[Path]:
    """Remove the folders whose owner is gone (its processes went with it). Returns them."""
    gone = [root for root in Path(tempfile.gettempdir()).glob(f"{PREFIX}*") if _owner_is_gone(root)]
    for root in gone:
        shutil.rmtree(root, ignore_errors=True)
    return gone


def _owner_is_gone(root: Path) -> bool:
    try:
        owner = json.loads((root / OWNER).read_text(encoding="utf-8"))
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) > 1)
    except psutil.NoSuchProcess:
        return True
    except (OSError, ValueError, KeyError):
        return False  # being made just now, or not ours to judge
