"""Sources whose input lies in a store (memory:// here): the same samples as from a disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
from cc3m_worlds import parallel
from instruct_trees import instruction_tuning
from listed_rows import write_parquet
from shard_worlds import contents, picture, write_tree
from source_checks import to_json
from test_source_coco import official, pictures
from test_source_ego4d import recordings, window
from test_source_nsd import tree

from onellm_dist.shards import build_dataset, open_dataset
from onellm_dist.shards.command import build_command


def _coco(root: Path) -> Path:
    return write_tree(
        root, {**pictures(), "annotations/captions_train2017.json": to_json(official())}
    )


def _ego4d(root: Path) -> Path:
    (recordings(root) / "window_idx_train.json").write_text(
        to_json([window("bbbb", 3.0, "x"), window("aaaa", 1.5, "y")])
    )
    return root


def _table(root: Path) -> Path:
    (parallel(root, "depth") / "cc3m.csv").write_text(
        "url\tcaption\n/mnt/x/cc3m/00000/000000002.jpg\tz\n"
    )
    return root


def _numbered(root: Path) -> Path:
    (root / "data").mkdir(parents=True)
    for name in ("train-00000-of-00002", "test-00000-of-00001"):
        write_parquet(root / f"data/{name}.parquet", [{"text": f"a text of {name}"}])
    return root


@pytest.mark.parametrize(
    ("source", "made", "options"),
    [
        ("coco", _coco, {}),
        ("nsd", tree, {}),
        ("parquet", _numbered, {"modality": "text"}),
        ("ego4d-imu", _ego4d, {}),
        ("cc3m-depth", _table, {}),
        ("cc3m-depth", _table, {"captions": "cc3m.csv"}),
        ("onellm-instruct", instruction_tuning, {"modality": "point"}),
        ("onellm-instruct", instruction_tuning, {"modality": "imu"}),
        ("onellm-instruct", instruction_tuning, {"modality": "normal"}),
    ],
    ids=[
        "coco",
        "nsd",
        "parquet",
        "ego4d",
        "cc3m",
        "cc3m-table",
        "instruct-point",
        "instruct-imu",
        "instruct-normal",
    ],
)
@pytest.mark.seconds
def test_a_store_as_input(
    tmp_path: Path, source: str, made: Callable[[Path], Path], options: dict[str, Any]
) -> None:
    local = made(tmp_path / "in")
    store, base = fsspec.filesystem("memory"), f"/sources-{tmp_path.name}"
    for file in local.rglob("*"):
        if file.is_file():
            store.pipe_file(f"{base}/{file.relative_to(local)}", file.read_bytes())
    try:
        build_dataset(source, local, tmp_path / "local", options={"name": "n", **options})
        build_dataset(
            source, f"memory:/{base}", tmp_path / "remote", options={"name": "n", **options}
        )
    finally:
        store.rm(base, recursive=True)
    found = contents(open_dataset(tmp_path / "remote"))
    assert found
    assert found == contents(open_dataset(tmp_path / "local"))


def test_the_command_prints_urls_as_they_were_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = write_tree(tmp_path / "in", {"a.jpg": picture(0), "a.txt": "x"})
    # The command line makes a Path of each argument, and a Path has one slash.
    paths = [inputs, Path("memory://printed/my set [1]")]
    assert build_command("folder", paths, [], workers=1, seed=0, overwrite=False) == 0
    assert "memory://printed/my set [1]: 1 sample" in capsys.readouterr().out
    fsspec.filesystem("memory").rm("/printed", recursive=True)
