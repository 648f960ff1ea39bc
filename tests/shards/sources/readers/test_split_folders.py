"""Folders that are splits for `folder`, those that are not, and what is noted of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from shard_worlds import picture, split_arguments, write_tree
from test_source_names import build, captions

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import build_dataset


def make_pairs(*folders: str) -> dict[str, bytes | str]:
    """A picture with a caption in each folder; all differ."""
    files: dict[str, bytes | str] = {}
    for i, folder in enumerate(folders):
        files |= {f"{folder}/{i}.png": picture(i, "PNG"), f"{folder}/{i}.txt": folder}
    return files


@pytest.mark.parametrize("name", ["eval", "Evaluation"])
def test_a_folder_of_evaluation_is_a_test_split(tmp_path: Path, name: str) -> None:
    report, dataset = build(tmp_path, make_pairs("train", name))
    assert captions(dataset) == {"train/0": "train"} and not report.notes
    assert captions(dataset, "test") == {f"{name}/1": name}


@pytest.mark.parametrize("name", ["eval", "test", "validation"])
def test_a_split_folder_without_media_is_passed_over_with_a_note(tmp_path: Path, name: str) -> None:
    files = {**make_pairs("train", "val"), f"{name}/run.py": "pass", f"{name}/results.json": "{}"}
    report, dataset = build(tmp_path, files)
    assert [dataset.samples(split) for split in ("train", "val")] == [1, 1]
    assert dataset.splits == ("train", "val")
    said = f"{name}/ has no media, and no table or several: nothing is read from it"
    assert report.notes == (said,)


@pytest.mark.parametrize("name", ["train/0.png", "../train/0.png"])
def test_a_split_whose_table_names_files_elsewhere_is_noted(tmp_path: Path, name: str) -> None:
    table = {"eval/a.csv": f"file,caption\n{name},x\n"}
    report, dataset = build(tmp_path, {**make_pairs("train"), **table})
    assert {*dataset.splits} == {"train", "test"}
    said = "eval/ (split test): all files that a.csv names lie elsewhere"
    assert [note for note in report.notes if note.startswith(said)]


def test_programs_and_several_results_are_no_split(tmp_path: Path) -> None:
    results = "file,caption\ntrain/0.png,a cat\n"
    files = {f"eval/{name}": "all:" for name in ("Makefile", "LICENSE", "run.cu", "paper.pdf")}
    results_of_two = {"eval/a.csv": results, "eval/b.csv": results}
    report, dataset = build(tmp_path, {**make_pairs("train", "val"), **files, **results_of_two})
    assert dataset.splits == ("train", "val")
    assert [note.split(":")[0] for note in report.notes] == [
        "eval/ has no media, and no table or several"
    ]


@pytest.mark.parametrize("name", ["val.zip", "cat.heic", "val-0.parquet", "shard"])
def test_a_split_folder_with_what_nothing_reads_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"val: no samples of modality image found \(ig"):
        build(tmp_path, {**make_pairs("train"), f"val/{name}": b"x", "val/README.md": "x"})
    with pytest.raises(UsageError, match=r"train: no file there is media of a known modality"):
        build(tmp_path / "other", {**make_pairs("test"), "train/fetch.sh": "x"})


def test_a_split_folder_may_be_a_link_or_a_table_of_files_elsewhere(tmp_path: Path) -> None:
    held_out = write_tree(tmp_path / "held out", {"7.png": picture(7, "PNG"), "7.txt": "seven"})
    root = write_tree(tmp_path / "in", make_pairs("train"))
    (root / "val").mkdir()
    (root / "val" / "images").symlink_to(held_out)
    (held_out / "again").symlink_to(held_out)
    table = {"test/metadata.csv": "file,caption\ntrain/0.png,zero\n"}
    report, dataset = build(tmp_path, table, follow=str(held_out))
    assert captions(dataset, "val") == {"val/images/7": "seven"}
    assert [*captions(dataset, "test").values()] == ["zero"]
    assert "test/ (split test): all files that metadata.csv names lie elsewhere" in str(
        report.notes
    )
    assert not any("nothing is read" in note for note in report.notes)


@pytest.mark.parametrize("inputs", [".", "t.csv", "../in"])
def test_a_relative_input_is_read_where_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: str
) -> None:
    files = {"cat.jpg": picture(0), **make_pairs("sub")}
    table = "file,caption\ncat.jpg,x\n" if inputs == "t.csv" else None
    text = {"cat.txt": "x"} if table is None else {"t.csv": table}
    monkeypatch.chdir(write_tree(tmp_path / "in", {**files, **text}))
    report = build_dataset("folder", inputs, "../out", options={"name": "same"})
    assert report.samples == (2 if table is None else 1)


@pytest.mark.parametrize(
    ("folders", "noted"),
    [
        (("train", "test", "more"), "1 sample in test/ is"),
        (("coco-train", "coco-val", "lm-eval"), "2 samples in coco-val/, lm-eval/ are"),
        (("a/train/x", "a/dev/x"), "1 sample in dev/ is"),
        (("train", "more"), None),
        (("train/test_tube", "val/train"), None),
    ],
)
def test_folders_that_are_not_taken_for_splits_are_noted(
    tmp_path: Path, folders: tuple[str, ...], noted: str | None
) -> None:
    """As those beside other media; but for what is of train anyway, or below a split."""
    report, dataset = build(tmp_path, make_pairs(*folders))
    assert [*dataset.splits] == (["train"] if noted or "more" in folders else ["train", "val"])
    assert len(report.notes) == bool(noted)
    assert all(note.startswith(f"{noted} of train: folders become") for note in report.notes)
    report, _ = build(tmp_path, {}, overwrite=True, split="val")
    assert not report.notes


def test_folders_that_a_table_names_are_noted(tmp_path: Path) -> None:
    files = make_pairs("train", "test")
    table = "file,caption\ntrain/0.png,x\ntest/1.png,y\n"
    report, dataset = build(tmp_path, {**files, "t.csv": table})
    assert dataset.splits == ("train",)
    assert any(note.startswith("1 sample in test/") for note in report.notes)
    for name in ("in", "media"):  # the folders above IN and media say nothing
        media = write_tree(tmp_path / "test" / name, files)
        elsewhere = write_tree(tmp_path / "test_in", {"t.csv": "file,caption\n0.png,x\n"})
        out = tmp_path / f"out_{name}"
        options = {"media": str(media / "train")}
        assert not build_dataset("folder", elsewhere, out, **split_arguments(options)).notes


def test_two_folders_of_one_split_are_joined_and_noted(tmp_path: Path) -> None:
    files = make_pairs("train", "val", "validation")
    files["validation/2.txt"] = "x"
    report, dataset = build(tmp_path, files)
    assert captions(dataset) == {"train/0": "train"}
    assert captions(dataset, "val") == {"val/1": "val", "validation/2": "x"}
    assert report.notes == ("the split val joins val/, validation/, which may share rows",)
    report, dataset = build(tmp_path, {}, overwrite=True, split="train")
    assert len(captions(dataset)) == 3 and not report.notes
