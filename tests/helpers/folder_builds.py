"""Builds of a folder of files, for tests of the builder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shard_worlds import picture, split_arguments, write_tree

from onellm_dist.shards import build_dataset
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.sources.base import BuildReport

FINE: dict[str, bytes | str] = {"a.jpg": picture(0), "a.txt": "x"}
"""A folder that builds."""


def build(
    tmp_path: Path, files: Mapping[str, bytes | str], **options: Any
) -> tuple[BuildReport, Dataset]:
    report = build_dataset(
        "folder", write_tree(tmp_path / "in", files), tmp_path / "out", **split_arguments(options)
    )
    return report, open_dataset(tmp_path / "out")
