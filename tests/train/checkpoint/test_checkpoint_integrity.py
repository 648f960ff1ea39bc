"""A checkpoint that was damaged, or written to deceive, is refused before any of it is used."""

from __future__ import annotations

import json
import random
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from one_rank import ONE_RANK

from onellm_dist.common.checksums import seal
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.run_files import CHECKPOINT_MANIFEST
from onellm_dist.config.schema import RunConfig
from onellm_dist.train.checkpoint.files import write_tensors
from onellm_dist.train.checkpoint.folder import make_checkpoint_name, read_manifest
from onellm_dist.train.checkpoint.resume import find_checkpoint
from onellm_dist.train.checkpoint.source import check_source, describe_source
from onellm_dist.train.checkpoint.state import _CheckpointFiles

FILE = "rank-00000.safetensors"
NAME = make_checkpoint_name(7)


def config(run_dir: Path, **model: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"dir": str(run_dir), "seed": 0},
            "model": model or {"preset": "toy"},
            "data": {"mixture": [{"path": "image"}], "global_batch": 1},
            "train": {"stage": "align", "steps": 1},
            "optim": {"lr": 1.0},
        }
    )


def checkpoint(run_dir: Path, **more: Any) -> Path:
    """A checkpoint of one rank as the writer leaves it."""
    folder = run_dir / "checkpoints" / NAME
    folder.mkdir(parents=True)
    tensors = {f"w:0:{key}": torch.randn(50) for key in ("master", "exp_avg", "exp_avg_sq")}
    record = write_tensors(folder / FILE, tensors)
    manifest = {
        "version": 2,
        "steps_done": 7,
        "files": {FILE: record.size},
        "sha256": {FILE: record.sha256},
        "parameters": {"w": {"shape": [50], "pieces": [[0, 50, FILE]]}},
    } | more
    (folder / CHECKPOINT_MANIFEST).write_text(json.dumps(seal(manifest), indent=1))
    return folder


@pytest.mark.parametrize("name", [FILE, CHECKPOINT_MANIFEST])
def test_a_flipped_bit_anywhere_is_found_before_a_resume(tmp_path: Path, name: str) -> None:
    folder = checkpoint(tmp_path)
    whole, manifest = (folder / name).read_bytes(), read_manifest(folder) or {}
    rng = random.Random(name)
    refused = 0
    for _ in range(100):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(data)
        try:
            find_checkpoint(config(tmp_path), folder.parent, ONE_RANK)
        except OneLLMError as error:
            refused += NAME in error.what
            continue
        # White space, or the name of the checksum: every value is the true one.
        read = read_manifest(folder) or {}
        assert [read[key] for key in list(read)[:-1]] == [
            manifest[key] for key in list(manifest)[:-1]
        ]
    assert refused >= (100 if name == FILE else 60)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../other": 3}},
        {"files": {}},
        {"sha256": {}},
        {"files": 3},
        {"version": 3},
        {"files": {f"{FILE}\0": 3}, "sha256": {f"{FILE}\0": "0"}},
    ],
)
def test_a_manifest_that_is_none_is_not_read(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = checkpoint(tmp_path, **change)
    with pytest.raises(OneLLMError, match="every checkpoint"):
        find_checkpoint(config(tmp_path), folder.parent, ONE_RANK)


def test_checkpoints_without_a_checksum_of_the_manifest_are_resumed(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    manifest = json.loads((folder / CHECKPOINT_MANIFEST).read_text())
    del manifest["content_sha256"]
    (folder / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))
    assert find_checkpoint(config(tmp_path), folder.parent, ONE_RANK).folder == folder


@pytest.mark.parametrize("damage", ["cut", "text", "name", "short"])
def test_files_without_checksums_are_refused_in_words(tmp_path: Path, damage: str) -> None:
    """Version 1 has no checksums: a damaged file is found when it is read."""
    folder = checkpoint(tmp_path)
    path = folder / FILE
    if damage == "short":
        write_tensors(path, {"w:0:master": torch.zeros(20)})
    else:
        data = path.read_bytes()
        new = {"cut": data[:100], "text": b"no tensors", "name": data.replace(b"w:0:", b"v:0:")}
        path.write_bytes(new[damage])
    own: Any = SimpleNamespace(name="w", start=0, length=50)
    with ExitStack() as stack, pytest.raises(OneLLMError, match=rf"{NAME}: {FILE}"):
        _CheckpointFiles(folder, stack).read(own, [(0, 50, FILE)], "master")


def test_frozen_weights_that_rotted_in_place_are_found(tmp_path: Path) -> None:
    """Size and time are as they were."""
    import os

    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    own = config(tmp_path, path=str(tmp_path))
    manifest = {"frozen": describe_source(own)}
    stat = path.stat()
    path.write_bytes(b"weighed")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(UsageError, match=r"model\.safetensors has sha256"):
        check_source(tmp_path, manifest, own, ONE_RANK)
