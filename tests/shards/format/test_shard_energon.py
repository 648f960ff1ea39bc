"""Megatron-Energon itself (7.4.1): each side reads what the other wrote, and both write the same.

Energon is not a dependency: these tests run where it is installed
(`pip install megatron-energon==7.4.1`).
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from braceexpand import braceexpand
from shard_worlds import all_bytes, contents, picture, write_tree

from onellm_dist.shards import build_dataset
from onellm_dist.shards.format.dataset import Dataset, open_dataset
from onellm_dist.shards.format.energon import ENERGON_VERSION
from onellm_dist.shards.tools.index_existing import index_existing_shards

energon = pytest.importorskip("megatron.energon", reason="megatron-energon is not installed")
pytestmark = pytest.mark.slow
PREPARE = (
    "import sys; from megatron.energon.cli.main import main; "
    "sys.argv[0] = 'energon'; sys.exit(main())"
)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Four train shards, one of val; keys with folders and letters that are not ASCII."""
    root = tmp_path_factory.mktemp("energon")
    rows = {"train": 10, "val": 3}
    files: dict[str, bytes | str] = {f"{i}.jpg": picture(i) for i in range(13)}
    for first, (split, count) in zip((0, 10), rows.items(), strict=True):
        files[f"{split}.csv"] = "caption\turl\n" + "".join(
            f"gr\u00fcn {i}\t{i}.jpg\n" for i in range(first, first + count)
        )
    build_dataset(
        "reference-lists",
        write_tree(root / "in", files),
        root / "out",
        options={"modality": "image", "name": "set", "max_samples": 3},
    )
    return open_dataset(root / "out")


def parts_of(sample: Any) -> dict[str, bytes]:
    """The parts of a crude sample."""
    return {k: bytes(v) for k, v in sample.items() if not k.startswith("__")}


def loaded(root: Path, split: str) -> dict[str, dict[str, bytes]]:
    """Every sample of a split, once, through Energon's own loader."""

    class Task(energon.DefaultTaskEncoder):  # type: ignore[name-defined,misc]
        decoder = None
        cookers = (energon.Cooker(energon.stateless(lambda sample: sample)),)

    config = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_val_dataset(
        str(root), split_part=split, worker_config=config, batch_size=None, task_encoder=Task()
    )
    return {
        sample["__key__"].split(".tar/")[-1]: parts_of(sample)
        for sample in energon.get_loader(dataset)
    }


def prepared(dataset: Dataset, root: Path) -> Path:
    """The bare tars as `energon prepare` leaves them."""
    shutil.copytree(
        dataset.root / "shards", root / "shards", ignore=shutil.ignore_patterns("*.idx", "*.index")
    )
    splits = [f"--split-parts={name}:shards/{name}-.*" for name in ("train", "val")]
    command = [
        sys.executable,
        "-c",
        PREPARE,
        "prepare",
        "--non-interactive",
        *splits,
        "--sample-type",
        "CrudeWebdataset",
        str(root),
    ]
    subprocess.run(command, check=True, capture_output=True)
    return root


def rows_of(database: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Tables with their rows, and indexes with their columns."""
    connection = sqlite3.connect(database)
    found = {
        name: sorted(connection.execute(f"SELECT * FROM {name}").fetchall())
        if kind == "table"
        else connection.execute(f"PRAGMA index_info({name})").fetchall()
        for kind, name in connection.execute("SELECT type, name FROM sqlite_master").fetchall()
    }
    connection.close()
    return found


@pytest.mark.parametrize("split", ["train", "val"])
def test_its_loader_reads_our_dataset(ours: Dataset, split: str) -> None:
    assert loaded(ours.root, split) == contents(ours, split)


def test_energon_prepare_writes_what_we_write(ours: Dataset, tmp_path: Path) -> None:
    root = prepared(ours, tmp_path / "prepared")
    mine, its = all_bytes(ours.root), all_bytes(root)
    equal = [
        ".nv-meta/.info.json",
        ".nv-meta/dataset.yaml",
        *(f"{s.path}.idx" for s in ours.manifest.shards),
    ]
    for name in equal:
        assert mine[name] == its[name], name
    assert json.loads(mine[".nv-meta/.info.json"])["energon_version"] == ENERGON_VERSION
    assert rows_of(ours.root / ".nv-meta/index.sqlite") == rows_of(root / ".nv-meta/index.sqlite")
    expanded = {
        split: [tar for given in tars for tar in braceexpand(given)]
        for split, tars in yaml.safe_load(its[".nv-meta/split.yaml"])["split_parts"].items()
    }
    assert expanded | {"test": []} == yaml.safe_load(mine[".nv-meta/split.yaml"])["split_parts"]
    assert len(its[".nv-meta/index.uuid"]) == len(mine[".nv-meta/index.uuid"])
    assert set(its) == {
        n for n in mine if n.startswith(".nv-meta/") or n.endswith((".tar", ".tar.idx"))
    }


def test_we_read_what_it_prepared(ours: Dataset, tmp_path: Path) -> None:
    root = prepared(ours, tmp_path / "prepared")
    index_existing_shards(root, modalities=("image",))
    dataset = open_dataset(root)
    assert dataset.splits == ours.splits
    for split in dataset.splits:
        assert contents(dataset, split) == contents(ours, split)
    assert loaded(root, "train") == contents(ours, "train")  # its own metadata is as it was
