"""Folders of Hugging Face's `save_to_disk`, given to sources that read JSON as well or alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from listed_rows import picture, talk, write_parquet
from source_checks import build_source, read_samples
from test_source_preferences import FORMS

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import build_dataset


def write_split(folder: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    folder.mkdir(parents=True)
    for name in ("data-00000-of-00001.arrow", "cache-12.arrow"):
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table)
    files = [{"filename": "data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files}))
    (folder / "dataset_info.json").write_text('{"features": {}}')


def write_dict(root: Path, rows: list[dict[str, Any]], *splits: str) -> Path:
    """What `DatasetDict.save_to_disk` writes: the first split has all rows, others one less."""
    for number, split in enumerate(splits):
        write_split(root / split, rows[number:])
    (root / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    return root


def test_pairs_of_a_dict_keep_their_splits(tmp_path: Path) -> None:
    """Splits and columns of ultrafeedback_binarized."""
    root = write_dict(tmp_path / "in", [FORMS["ultrafeedback"]] * 3, "train_prefs", "test_prefs")
    report, dataset = build_source("preferences", root, tmp_path / "out")
    keys = {split: [*read_samples(dataset, split)] for split in ("train", "test")}
    assert [len(keys["train"]), len(keys["test"])] == [3, 2]
    assert keys["test"][0] == "test_prefs/data-00000-of-00001-0000000"
    assert not report.failures and report.notes == ("cache files of datasets left out: 2",)
    _, dataset = build_source("parquet", root, tmp_path / "texts", modality="text", max_failures=1)
    assert dataset.samples("test") == 2
    with pytest.raises(UsageError, match=r"dataset_dict\.json describes it") as refused:
        build_dataset("preferences", root / "dataset_dict.json", tmp_path / "none")
    assert "name its folder" in refused.value.do


def test_documents_of_a_dict(tmp_path: Path) -> None:
    row = {"images": ["a.jpg", None], "texts": [None, "a cat"]}
    root = write_dict(tmp_path / "in", [row] * 3, "train", "validation")
    (root / "images").mkdir()
    (root / "images/a.jpg").write_bytes(picture())
    report, dataset = build_source("obelics", root, tmp_path / "out")
    assert not report.failures
    assert [len(read_samples(dataset, split)) for split in ("train", "val")] == [3, 2]
    _, dataset = build_source(
        "obelics", root / "train", tmp_path / "one", media=str(root / "images")
    )
    assert len(read_samples(dataset)) == 3


@pytest.mark.parametrize(
    ("source", "options", "command"),
    [
        ("folder", {}, "build parquet IN OUT"),
        ("folder", {"modality": "text"}, "build parquet IN OUT"),
        ("sharegpt", {}, "build parquet IN OUT reads it, with -o modality=text"),
        ("interleaved", {"modality": "image"}, "-o several=list -o modality=image"),
        ("reference-lists", {"modality": "image"}, "build parquet IN OUT"),
    ],
)
def test_sources_of_json_name_the_command(
    tmp_path: Path, source: str, options: dict[str, str], command: str
) -> None:
    root = write_dict(tmp_path / "in", [{"conversations": talk("a")}] * 2, "train", "test")
    for inputs in (root, root / "train"):
        with pytest.raises(UsageError, match="save_to_disk") as refused:
            build_dataset(source, inputs, tmp_path / "out", options=options)
        assert command in refused.value.do
    _, dataset = build_source("parquet", root, tmp_path / "out", modality="text")
    assert [dataset.samples(split) for split in ("train", "test")] == [2, 1]


def test_the_hubs_description_is_no_row(tmp_path: Path) -> None:
    (tmp_path / "in/data").mkdir(parents=True)
    write_parquet(tmp_path / "in/data/train-0.parquet", [{"conversations": talk("a")}])
    (tmp_path / "in/dataset_infos.json").write_text('{"default": {}}')
    with pytest.raises(UsageError, match=r"has no \.json or \.jsonl") as refused:
        build_dataset("sharegpt", tmp_path / "in", tmp_path / "out")
    assert "build parquet IN OUT" in refused.value.do
