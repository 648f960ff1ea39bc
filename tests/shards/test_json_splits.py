"""In a folder of JSON files, names say the splits, as those of tables do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from source_checks import build_source

TALK = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cube."}]
ROWS: dict[str, dict[str, Any]] = {
    "sharegpt": {"conversations": TALK},
    "interleaved": {"conversations": TALK},
    "preferences": {"prompt": "What is it?", "chosen": "A cube.", "rejected": "A cat."},
    "mmc4": {
        "text_list": ["A cube."],
        "image_info": [{"image_name": "0.png", "matched_text_index": 0}],
    },
}


def write(folder: Path, source: str, *names: str) -> None:
    from PIL import Image

    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "images" / "0.png")
    for name in names:
        (folder / name).write_text(json.dumps(ROWS[source]))


@pytest.mark.parametrize("source", ROWS)
def test_names_of_files_say_the_splits(tmp_path: Path, source: str) -> None:
    names = ("train.jsonl", "rows.jsonl", "test.jsonl", "my_validation-set.json")
    write(tmp_path / "in", source, *names)
    report, dataset = build_source(source, tmp_path / "in", tmp_path / "out")
    counts = {split: dataset.samples(split) for split in dataset.splits}
    assert counts == {"train": 2, "val": 1, "test": 1} and not report.quarantined


@pytest.mark.parametrize("source", ROWS)
def test_a_file_that_is_named_is_trained_on(tmp_path: Path, source: str) -> None:
    write(tmp_path / "in", source, "train.jsonl", "test.jsonl")
    _, dataset = build_source(source, tmp_path / "in/test.jsonl", tmp_path / "out")
    assert [*dataset.splits] == ["train"] and dataset.samples() == 1


@pytest.mark.parametrize("source", ROWS)
def test_splits_that_become_one_are_noted(tmp_path: Path, source: str) -> None:
    write(tmp_path / "in", source, "train_a.jsonl", "train_b.jsonl", "test_1.jsonl", "test_2.jsonl")
    report, dataset = build_source(source, tmp_path / "in", tmp_path / "out")
    assert {split: dataset.samples(split) for split in dataset.splits} == {"train": 2, "test": 2}
    (note,) = [note for note in report.notes if "joins" in note]
    assert note.startswith("the split train joins train_a, train_b")
