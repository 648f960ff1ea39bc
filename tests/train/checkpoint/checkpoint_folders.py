"""Checkpoints that tests write by hand, and a recipe that looks for them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from onellm_dist.common.run_files import CHECKPOINT_MANIFEST
from onellm_dist.config.schema import RunConfig


def checkpoint(
    folder: Path, *, version: int = 2, data: bytes = b"abc", said: bytes | None = None, **more: Any
) -> Path:
    """A folder with one file, and a manifest that says of it what `said` would be."""
    folder.mkdir(parents=True)
    said = data if said is None else said
    (folder / "rank-00000.safetensors").write_bytes(data)
    manifest = {"version": version, "files": {"rank-00000.safetensors": len(said)}, **more}
    if version > 1:
        manifest["sha256"] = {"rank-00000.safetensors": hashlib.sha256(said).hexdigest()}
    (folder / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))
    return folder


def config(run_dir: Path, **keys: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": str(run_dir), "seed": keys.pop("seed", 0)},
            "model": keys.pop("model", {"preset": "toy"}),
            "data": {"mixture": [{"path": "image"}], "global_batch": 1},
            "train": {"stage": "align", "steps": 1},
            "optim": {"lr": 1.0},
            "checkpoint": keys,
        }
    )
