"""The source preferences: parquet and Arrow tables, as the Hub and `datasets` write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq
from shard_worlds import write_tree
from source_checks import build_source, make_photo, read_samples
from test_source_preferences import ASKED, FORMS, QUESTION, STORED, WHOLE, message

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers.preference_rows import split_row


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def test_tables_of_the_hub_are_read_with_their_media(tmp_path: Path) -> None:
    """The columns of RLAIF-V, and of TRL's pairs with images in content parts."""
    image = {"bytes": make_photo(seed=1), "path": "1.jpg"}
    rlaif = {"ds_name": "RLAIF-V", "image": image, **FORMS["rlaif_v"], "origin_dataset": "COCO"}
    write_table(tmp_path / "a/part_000.parquet", [{**rlaif, "idx": i} for i in range(3)])
    asked = [{"type": "image", "text": None}, {"type": "text", "text": "Why?"}]
    trl = {**FORMS["trl"], "prompt": [{"role": "user", "content": asked}], "images": [image]}
    write_table(tmp_path / "b/train-0.parquet", [trl])
    for folder, count, question in (("a", 3, "Why?"), ("b", 1, "<image>Why?")):
        report, dataset = build_source(
            "preferences", tmp_path / folder, tmp_path / f"out_{folder}", modality="image"
        )
        samples = read_samples(dataset)
        assert len(samples) == count and not report.quarantined
        for sample in samples.values():
            found = sample["json"]
            assert sample["0.jpg"] == make_photo(seed=1) and found["media"] == ["image"]
            assert found["conversations"][0]["value"] == question
            assert (found["chosen"], found["rejected"]) == STORED[1:]


def test_a_preference_may_be_a_whole_float(tmp_path: Path) -> None:
    """As pandas writes a column of whole numbers of which one is missing."""
    numbers = (2.0, None, 1.5)
    rows = [{**FORMS["llava_rlhf"], "preference": number} for number in numbers]
    write_table(tmp_path / "in/train-0.parquet", rows)
    report, dataset = build_source(
        "preferences", tmp_path / "in", tmp_path / "out", max_failures=0.9
    )
    (sample,) = read_samples(dataset).values()
    assert (sample["json"]["chosen"], sample["json"]["rejected"]) == STORED[1:]
    reasons = [q.reason for q in report.quarantined]
    assert reasons == [
        f"unreadable row: preference is {number}, neither 1 nor 2" for number in numbers[1:]
    ]
    with pytest.raises(BadSampleError, match="preference is True"):
        split_row({**FORMS["llava_rlhf"], "preference": True})


def test_a_key_that_is_null_is_absent(tmp_path: Path) -> None:
    """Tables give the turns of a column the keys of all."""
    null = {"from": None, "value": None, "role": None, "content": None}
    answers = {key: [{**null, **turn} for turn in turns] for key, turns in WHOLE.items()}
    other = [{**null, **QUESTION}, {**null, **message("assistant", "no")}]
    outputs = {f"output_{i}": {**null, "content": text} for i, text in ((1, "because"), (2, "so"))}
    rows: list[dict[str, Any]] = [
        {**answers, "prompt": "Why?"},
        {"chosen": answers["chosen"], "rejected": other, "prompt": "Why?"},
        {"conversations": [{**null, **ASKED}], **outputs, "preference": 1},
    ]
    columns = {key: None for row in rows for key in row}
    write_table(tmp_path / "in/train-0.parquet", [{**columns, **row} for row in rows])
    _, dataset = build_source("preferences", tmp_path / "in", tmp_path / "out")
    samples = [sample["json"] for sample in read_samples(dataset).values()]
    assert [sample["conversations"] for sample in samples] == [[QUESTION]] * 3
    texts = [[sample[key][0]["value"] for key in ("chosen", "rejected")] for sample in samples]
    assert texts == [["because", "so"], ["because", "no"], ["because", "so"]]


def write_saved(folder: Path, rows: list[dict[str, Any]], state: dict[str, Any]) -> Path:
    """What `datasets.save_to_disk` leaves, and a cache of its work."""
    table = pa.Table.from_pylist(rows)
    folder.mkdir()
    for name in ("data-00000-of-00001.arrow", "cache-12.arrow"):
        with pa.ipc.new_stream(folder / name, table.schema) as writer:
            writer.write_table(table)
    files = [{"filename": "data-00000-of-00001.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, **state}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_what_datasets_writes_beside_tables_is_no_rows(tmp_path: Path) -> None:
    rows = [FORMS["rlaif_v"]] * 3
    saved = write_saved(tmp_path / "saved", rows, {})
    write_table(tmp_path / "hub/train-0.parquet", rows)
    (tmp_path / "hub/dataset_infos.json").write_text("{}")
    for folder in (saved, tmp_path / "hub"):
        _, dataset = build_source("preferences", folder, tmp_path / f"out_{folder.name}")
        assert len(read_samples(dataset)) == 3
    chosen = write_saved(tmp_path / "chosen", rows, {"_indices_data_files": [{"filename": "i"}]})
    with pytest.raises(UsageError, match="indices mapping"):
        build_source("preferences", chosen, tmp_path / "again")
    with pytest.raises(UsageError, match="no tables but a cache"):
        build_source("preferences", saved / "cache-12.arrow", tmp_path / "again")


def test_tables_of_text_keep_their_splits_and_mix_with_no_json(tmp_path: Path) -> None:
    rows = [{**FORMS["trl_implicit"], "prompt": "Why?", "score_chosen": 8.0}] * 3
    for split in ("train", "test"):
        write_table(tmp_path / f"in/{split}_prefs-00000-of-00001.parquet", rows)
    _, dataset = build_source("preferences", tmp_path / "in", tmp_path / "out")
    for split in ("train", "test"):
        found = read_samples(dataset, split)
        assert list(found)[2] == f"{split}_prefs-00000-of-00001-0000002" and len(found) == 3
        for sample in found.values():
            texts = [[t["value"] for t in sample["json"][k]] for k in ("chosen", "rejected")]
            assert texts == [["because"], ["so"]]
    write_tree(tmp_path / "in", {"rows.jsonl": json.dumps(FORMS["ours"])})
    with pytest.raises(UsageError, match="has tables"):
        build_source("preferences", tmp_path / "in", tmp_path / "again")
