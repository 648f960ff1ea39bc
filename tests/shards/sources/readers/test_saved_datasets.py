"""Folders of Hugging Face's `save_to_disk`, given to sources that read JSON as well or alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from listed_rows import picture, talk, write_parquet
from source_checks import build_source, read_samples
from test_source_preferences import FORMS

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import build_dataset
from onellm_dist.shards.sources.readers.saved_datasets import list_dataset_files


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


def test_documents_have_the_split_of_their_file_wherever_they_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"images": ["a.jpg", None], "texts": [None, "a cat"]}
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / "data/images/a.jpg").write_bytes(picture())
    for split, count in (("train", 3), ("test", 2)):
        write_parquet(tmp_path / f"data/{split}-00000-of-00001.parquet", [row] * count)
    media = str(tmp_path / "data/images")
    for number, (folder, inputs) in enumerate(((".", "."), (".", "./data"), ("data", "."))):
        monkeypatch.chdir(tmp_path / folder)
        _, dataset = build_source("obelics", Path(inputs), tmp_path / f"out/{number}", media=media)
        assert [dataset.samples(split) for split in ("train", "test")] == [3, 2]
    one = Path("test-00000-of-00001.parquet")
    _, dataset = build_source("obelics", one, tmp_path / "out/one", media=media)
    assert dataset.samples("test") == 2


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


def test_what_a_saved_data_set_lacks_is_named(tmp_path: Path) -> None:
    root = write_dict(tmp_path / "in", [FORMS["trl"]] * 3, "train", "test")
    files = [{"filename": f"data-0000{number}-of-00002.arrow"} for number in range(2)]
    (root / "train/data-00000-of-00001.arrow").rename(root / "train" / files[0]["filename"])
    (root / "train/state.json").write_text(json.dumps({"_data_files": files}))
    lacks = r"state\.json lists data-00001-of-00002\.arrow, which is missing \(1 of 2 files\)"
    for source, options in (("preferences", {}), ("parquet", {"modality": "text"})):
        for inputs in (root, root / "train"):
            with pytest.raises(UsageError, match=lacks):
                build_dataset(source, inputs, tmp_path / "out", options=options)
    one = root / "train" / files[0]["filename"]
    assert len(read_samples(build_source("preferences", one, tmp_path / "one")[1])) == 3
    shutil.rmtree(root / "train")
    with pytest.raises(UsageError, match=r"dataset_dict\.json lists train/state\.json"):
        build_dataset("preferences", root, tmp_path / "out")


def test_json_beside_a_saved_data_set_hides_no_missing_file(tmp_path: Path) -> None:
    document = {"images": ["a.jpg", None], "texts": [None, "a cat"]}
    for source, row in (("preferences", FORMS["trl"]), ("obelics", document)):
        root = tmp_path / source
        write_split(root, [row])
        files = [{"filename": f"data-0000{n}-of-00001.arrow"} for n in range(2)]
        (root / "state.json").write_text(json.dumps({"_data_files": files}))
        (root / "stats.json").write_text("{}")
        with pytest.raises(UsageError, match=r"state\.json lists data-00001-of-00001\.arrow"):
            build_dataset(source, root, tmp_path / "out")
        # Below a folder of rows it is not read, whatever it lacks.
        (root / "stats.json").unlink()
        rows = tmp_path / f"{source}_rows"
        rows.mkdir()
        (rows / "rows.jsonl").write_text(json.dumps(row))
        root.rename(rows / "saved")
        files_of_rows, notes = list_dataset_files(rows)
        assert [path.name for path in files_of_rows] == ["rows.jsonl"]
        assert notes == ("ignored in folders below: 2 x .arrow; name such a folder to read it",)


@pytest.mark.parametrize(
    ("name", "refused_at"),
    [
        ("dataset_dict.json", ""),
        ("train/state.json", ""),
        ("train/state.json", "train"),
        ("train/state.json", "no Arrow file"),
    ],
)
def test_a_description_that_was_cut_short_is_refused(
    tmp_path: Path, name: str, refused_at: str
) -> None:
    root = write_dict(tmp_path / "in", [FORMS["trl"]] * 3, "train", "test")
    (root / name).write_text((root / name).read_text()[:20])
    one = root / "train/data-00000-of-00001.arrow"
    assert len(read_samples(build_source("preferences", one, tmp_path / "one")[1])) == 3
    if refused_at == "no Arrow file":
        for path in (root / "train").glob("*.arrow"):
            path.unlink()
    inputs = root / "train" if refused_at == "train" else root
    for source, options in (("preferences", {}), ("parquet", {"modality": "text"})):
        with pytest.raises(UsageError, match=rf"{name} cannot be read \("):
            build_dataset(source, inputs, tmp_path / "out", options=options)


def test_names_say_how_many_files_there_are_without_a_description(tmp_path: Path) -> None:
    write_split(tmp_path / "in", [FORMS["trl"]] * 3)
    first, second = (tmp_path / f"in/data-0000{n}-of-00002.arrow" for n in range(2))
    (tmp_path / "in/data-00000-of-00001.arrow").rename(first)
    (tmp_path / "in/cache-12.arrow").rename(tmp_path / "second")
    for state in ('{"of": "another program"}', None):
        (tmp_path / "in/state.json").unlink()
        if state is not None:
            (tmp_path / "in/state.json").write_text(state)
        lacks = r"count data-00001-of-00002\.arrow, which is missing \(1 of 2 files\)"
        with pytest.raises(UsageError, match=lacks):
            build_dataset("preferences", tmp_path / "in", tmp_path / "out")
    (tmp_path / "second").rename(second)
    _, dataset = build_source("preferences", tmp_path / "in", tmp_path / "out")
    assert dataset.samples() == 6


def test_a_saved_dataset_that_is_saved_again_is_read_anew(tmp_path: Path) -> None:
    write_split(tmp_path / "in", [FORMS["trl"]])
    assert list_dataset_files(tmp_path / "in")[0] == [tmp_path / "in/data-00000-of-00001.arrow"]
    (tmp_path / "in/data-00000-of-00001.arrow").rename(tmp_path / "in/data-0.arrow")
    (tmp_path / "in/state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    assert list_dataset_files(tmp_path / "in")[0] == [tmp_path / "in/data-0.arrow"]


def test_pairs_of_several_splits_of_a_kind_are_refused(tmp_path: Path) -> None:
    """A clone of ultrafeedback_binarized, whose pairs stand in each of its splits."""
    names = ("train_prefs", "train_sft", "train_gen", "test_prefs")
    (tmp_path / "hub/data").mkdir(parents=True)
    for name in names:
        path = tmp_path / f"hub/data/{name}-00000-of-00001.parquet"
        write_parquet(path, [FORMS["ultrafeedback"]])
    saved = write_dict(tmp_path / "saved", [FORMS["ultrafeedback"]] * 4, *names)
    joined = "train: train_gen, train_prefs, train_sft"
    for root in (tmp_path / "hub", tmp_path / "hub/data", saved):
        with pytest.raises(UsageError, match=joined) as refused:
            build_dataset("preferences", root, tmp_path / "out")
        assert "name the one to read" in refused.value.do
    one = tmp_path / "hub/data/train_prefs-00000-of-00001.parquet"
    for number, inputs in enumerate((one, saved / "train_prefs")):
        _, dataset = build_source("preferences", inputs, tmp_path / f"out_{number}")
        assert dataset.samples("train") == 4 - 3 * (inputs == one)
    report, dataset = build_source(
        "parquet", tmp_path / "hub", tmp_path / "texts", modality="text", max_failures=1
    )
    assert any("the split train joins train_gen, train_prefs" in n for n in report.notes)
    report, _ = build_source(
        "parquet", tmp_path / "hub", tmp_path / "all", modality="text", split="train"
    )
    assert not any("the split train joins" in note for note in report.notes)


def test_tables_below_a_folder_are_read_or_named(tmp_path: Path) -> None:
    """A clone of the Hub has its tables in data/; a split may have a folder of its own."""
    hub, mixed = tmp_path / "hub", tmp_path / "mixed"
    for path in (hub / "data/train-0.parquet", hub / "test/test-0.parquet", mixed / "b/c.parquet"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(path, [FORMS["trl_text"]])
    (hub / "dataset_infos.json").write_text("{}")
    _, dataset = build_source("preferences", hub, tmp_path / "out")
    assert [dataset.samples(split) for split in ("train", "test")] == [1, 1]
    write_parquet(hub / "cache-1.parquet", [FORMS["trl_text"]])
    report, dataset = build_source("preferences", hub, tmp_path / "again")
    assert dataset.samples("train") == 2 and not report.notes
    (mixed / "rows.jsonl").write_text(json.dumps(FORMS["ours"]))
    (mixed / "dataset_infos.json").write_text("{}")
    report, dataset = build_source("preferences", mixed, tmp_path / "rows")
    assert dataset.samples() == 1 and not report.quarantined
    assert any("ignored in folders below: 1 x .parquet" in note for note in report.notes)


def test_a_cache_that_is_named_is_read(tmp_path: Path) -> None:
    write_split(tmp_path / "in", [FORMS["trl_text"]])
    named = (tmp_path / "in/cache-12.arrow").rename(tmp_path / "cache-12.arrow")
    _, dataset = build_source("preferences", named, tmp_path / "out")
    assert dataset.samples() == 1
