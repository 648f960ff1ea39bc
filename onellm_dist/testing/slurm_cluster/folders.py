"""The folders of throw-away clusters.

Each folder names the process that owns it, so that a folder whose owner was killed is found and
removed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import psutil

PREFIX = "onellm-slurm-"
OWNER = "owner.json"


def make_folder() -> Path:
    """Make a new folder that belongs to this process."""
    root = Path(tempfile.mkdtemp(prefix=PREFIX))
    root.chmod(0o755)  # munge refuses a socket below a folder that others cannot enter
    owner = {"pid": os.getpid(), "started": psutil.Process().create_time()}
    (root / OWNER).write_text(json.dumps(owner))
    return root


def remove_stale_folders() -> list[Path]:
    """Remove the folders whose owner is gone; its processes ended with it.

    Returns:
        The removed folders.
    """
    folders = Path(tempfile.gettempdir()).glob(f"{PREFIX}*")
    stale = [folder for folder in folders if _is_stale(folder)]
    for folder in stale:
        shutil.rmtree(folder, ignore_errors=True)
    return stale


def _is_stale(folder: Path) -> bool:
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return bool(abs(psutil.Process(owner["pid"]).create_time() - owner["started"]) > 1)
    except psutil.NoSuchProcess:
        return True
    except (OSError, ValueError, KeyError):
        return False  # it is just being made, or is not one of ours
