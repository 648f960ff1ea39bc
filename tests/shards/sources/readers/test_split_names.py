"""Names of files say the splits, of JSON and of tables; what becomes one is noted or refused."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any

import pytest
from listed_rows import write_parquet
from source_checks import build_source
from test_source_preferences import FORMS

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import build_dataset
from onellm_dist.shards.sources.readers.split_names import note_splits

TALK = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A cube."}]
UUIDS = (
    "7e1f0d3a-9b2c-4d5e-8f60-123456789abc",
    "abcdefab-cdef-abcd-efab-cdefabcdefab",
    "ABCDEFAB-cdef-4bcd-aeff-deadbeefcafe",
)
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


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["train-00001-of-00042"], ["train: 41 of its 42 parquet files are not there"]),
        (["train-00000-of-00002", "train-00001-of-00002"], []),
        (
            ["train-00000-of-00002-9564e8b05b4757ab"],
            ["train: 1 of its 2 parquet files is"],
        ),
        (
            ["part-00000-of-00003", "train-00000-of-00001"],
            ["part: 2 of its 3 parquet files are"],
        ),
        (["train-00001-of-00002", "train-00002-of-00002"], []),
        (["train-00002-of-00003", "train-00003-of-00003"], ["train: 1 of its 3 parquet files is"]),
        (["train-00000-of-00002", "train-00002-of-00002"], ["train: 1 of its 2 parquet files is"]),
        (["00001-of-00002"], ["the table: 1 of its 2 parquet files is not there"]),
        (["0000", "0001"], []),
        (["train-00000-of-00042.snappy"], ["train: 41 of its 42 parquet files are not there"]),
        (
            ["en/train-00000-of-00002", "de/train-00000-of-00003"],
            ["de/train: 2 of its 3", "en/train: 1 of its 2"],
        ),
        (
            ["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"],
            ["train: its parts are there in several numberings or copies"],
        ),
        (["train-00000-of-00001", "train-00000-of-00001-9564e8b05b4757ab"], ["train: its parts"]),
    ],
)
def test_parts_of_a_table_that_are_not_there_once_are_noted(
    tmp_path: Path, names: list[str], wanted: list[str]
) -> None:
    """A few parts may be wanted: they are built, and a download that broke off is seen."""
    for name in names:
        path = tmp_path / f"hub/data/{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, [FORMS["trl_text"]])
    texts = {"modality": "text", "caption_column": "chosen"}
    for source, options in (("parquet", texts), ("preferences", {})):
        report, dataset = build_source(source, tmp_path / "hub", tmp_path / source, **options)
        assert dataset.samples() == len(names)
        noted = [note for note in report.notes if "not there" in note or "copies" in note]
        assert len(noted) == len(wanted)
        assert all(note.startswith(start) for note, start in zip(noted, wanted, strict=True))


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train-00000-of-00002-9564e8b05b4757ab", "train-00001-of-00002-0aabc"), {"train": 2}),
        (("a/train_prefs-0", "b/train_prefs-1", "rows"), {"train": 3}),
        (("train/a", "train/b"), {"train": 2}),
        (("train_part1", "train_part2", "test_part1"), {"train": 2, "test": 1}),
        (("default/train_prefs/0000", "default/test_prefs/0000"), {"train": 1, "test": 1}),
        (("train_prefs/part-0", "test_prefs/part-0"), {"train": 1, "test": 1}),
        (("shard_0_train", "shard_1_train", "my test"), {"train": 2, "test": 1}),
        (("00000-train", "00001-Train", "test1"), {"train": 2, "test": 1}),
        (("train-6f1ed0aa31d9", "train-7f1ed0bb52e9"), {"train": 2}),
        (("train_p1of2", "train_p2of2", "eval"), {"train": 2, "test": 1}),
        (("data/train-00000-of-00001", "data/evaluation-00000-of-00001"), {"train": 1, "test": 1}),
        (("part-00000-of-00002", "part-00001-of-00002"), {"train": 2}),
        (("en/part-00000-of-00001", "de/part-00000-of-00001"), {"train": 2}),
        (("en/2019", "de/2019"), {"train": 2}),
        (("train_0/a", "train_1/a", "test_0/a"), {"train": 2, "test": 1}),
        (("train_0_1a2b3c4", "train_0_2d3e4f5"), {"train": 2}),
        (("human_eval_train", "human_eval"), {"train": 1, "test": 1}),
        (("eval-x/rows", "x/rows"), {"train": 1, "test": 1}),
        (("coco-train/rows", "coco-val/rows"), {"train": 1, "val": 1}),
        (("a_train/0", "clean_test/0", "de-dev/0"), {"train": 1, "val": 1, "test": 1}),
        (("train/lm-eval/rows", "test/lm-eval/rows"), {"train": 1, "test": 1}),
        (("train/part-00000-of-00002", "train/part-00001-of-00002"), {"train": 2}),
        (("train_0/part-00000-of-00001", "train_1/part-00000-of-00001"), {"train": 2}),
        ((f"train-{UUIDS[0]}", f"train-{UUIDS[1]}", f"train_{UUIDS[2]}"), {"train": 3}),
        (("train-cafebabe-0", "train-1a2b3c4d-1", "train-12345678-2"), {"train": 3}),
        (("train_face_deadbeef", "train_face_1a2b3c4d"), {"train": 2}),
        (("train-sft/0000", "train-sft/0999", "train-sft/1000", "train-sft/10000"), {"train": 4}),
        (("train/raw/0000", "train/raw/1000"), {"train": 2}),
        (("train-sft/0000", "train-sft/more"), {"train": 2}),
        (("train/a", "train/b", "train/2019"), {"train": 3}),
    ],
)
def test_files_of_one_split_are_no_several(
    tmp_path: Path, names: tuple[str, ...], splits: dict[str, int]
) -> None:
    for name in names:
        path = tmp_path / f"in/{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, [FORMS["trl_text"]])
    report, dataset = build_source("preferences", tmp_path / "in", tmp_path / "out")
    assert {split: dataset.samples(split) for split in splits} == splits and not report.notes


@pytest.mark.parametrize(
    "names",
    [
        ("train_v1-00000-of-00001", "train_v2-00000-of-00001"),
        ("data/train_sft-00000-of-00001", "data/train_sft2-00000-of-00001"),
        ("train_iteration_1-00000-of-00001", "train_iteration_2-00000-of-00001"),
        ("raw-00000-of-00001", "filtered-00000-of-00001"),
        ("raw/0000", "filtered/0000"),
        ("train_sft", "train_prefs_0"),
        ("train_sft/part-00000-of-00001", "train_gen/part-00000-of-00001"),
        ("train_sft/data/0000", "train_gen/data/0000"),
        ("train-sft/0000", "train-gen/1000"),
        ("train-cafebabe", "train-1a2b3c4"),
        ("train_face", "train_2019"),
        ("a-train/rows", "b-train/rows"),
    ],
)
def test_splits_that_become_one_are_refused_for_pairs(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        path = tmp_path / f"in/{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, [FORMS["trl_text"]])
    with pytest.raises(UsageError, match="several splits that would be train") as refused:
        build_dataset("preferences", tmp_path / "in", tmp_path / "out")
    assert "mix them" in refused.value.do
    texts = {"modality": "text", "caption_column": "chosen"}
    report, dataset = build_source("parquet", tmp_path / "in", tmp_path / "texts", **texts)
    assert dataset.samples() == 2 and any("joins" in note for note in report.notes)


@pytest.mark.parametrize("source", ["parquet", "preferences"])
def test_a_word_that_is_not_used_is_noted(tmp_path: Path, source: str) -> None:
    """lm-eval/ may hold anything: its rows are of train, and the user hears of it."""
    for name in ("lm-eval/rows", "my_evaluation/x/rows", "lm-eval/test", "more/rows"):
        path = tmp_path / f"in/{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, [FORMS["trl_text"]])
    options = {"modality": "text", "caption_column": "chosen"} if source == "parquet" else {}
    report, dataset = build_source(source, tmp_path / "in", tmp_path / "out", **options)
    assert {split: dataset.samples(split) for split in dataset.splits} == {"train": 3, "test": 1}
    (note,) = report.notes
    assert note.startswith("the rows in lm-eval/, my_evaluation/ are of train")
    if source == "parquet":
        options["split"] = "train"
        report, _ = build_source(source, tmp_path / "in", tmp_path / "named", **options)
        assert not report.notes


@pytest.mark.parametrize("source", ROWS)
def test_a_split_in_two_forms_is_noted(tmp_path: Path, source: str) -> None:
    names = ("train.json", "train.jsonl", "rows.json", "rows.jsonl", "test_1.json", "test_2.jsonl")
    write(tmp_path / "in", source, *names)
    report, dataset = build_source(source, tmp_path / "in", tmp_path / "out")
    assert {split: dataset.samples(split) for split in dataset.splits} == {"train": 4, "test": 2}
    assert [note for note in report.notes if "two formats" in note] == [
        "there in two formats, .json and .jsonl, which may repeat rows: rows, train"
    ]


def test_files_of_two_folders_or_names_are_no_two_formats() -> None:
    names = ("en/train.json", "de/train.jsonl", "train/a.json", "train/b.jsonl", "train/2.json")
    assert note_splits(map(PurePath, names)) == ()


def test_rows_held_out_by_a_later_word_are_noted_where_none_are_of_train(tmp_path: Path) -> None:
    names = ("web-dev/rows", "a/unit_test/rows", "b/my-train/x", "b/my-val/x", "valid-2/x", "rows")
    for name in names:
        path = tmp_path / f"in/{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, [FORMS["trl_text"]])
    texts = {"modality": "text", "caption_column": "chosen"}
    report, dataset = build_source("parquet", tmp_path / "in", tmp_path / "out", **texts)
    counts = {split: dataset.samples(split) for split in dataset.splits}
    assert counts == {"train": 2, "val": 3, "test": 1}
    assert sorted(note for note in report.notes if "later" in note or "by a word" in note) == [
        "the rows in unit_test/ are of test, by a word of the folder's name; rename it if they are "
        "to be trained on",
        "the rows in web-dev/ are of val, by a word of the folder's name; rename it if they are "
        "to be trained on",
    ]


def test_tables_of_a_split_in_two_forms_are_noted(tmp_path: Path) -> None:
    names = ("train-00000-of-00001", "train", "test-00000-of-00001", "de/rows", "en/rows")
    for name in names:
        path = tmp_path / f"in/{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, [FORMS["trl_text"]])
    report, dataset = build_source("preferences", tmp_path / "in", tmp_path / "out")
    assert dataset.samples("train") == 4
    assert report.notes == (
        "there in two formats, .parquet and numbered .parquet, which may repeat rows: train",
    )


def test_a_table_beside_its_parts_in_the_folder_data_is_noted(tmp_path: Path) -> None:
    for name in ("train.parquet", "data/train-00000-of-00001.parquet"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, [FORMS["trl_text"]])
    report, _ = build_source("preferences", tmp_path / "in", tmp_path / "out")
    assert report.notes == (
        "there in two formats, .parquet and numbered .parquet, which may repeat rows: train",
    )
