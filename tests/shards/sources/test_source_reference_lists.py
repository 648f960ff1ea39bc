"""Source reference-lists: the lists of OneLLM's own code, for every modality in them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from recipe_builds import build_recipe
from shard_worlds import write_tree
from source_checks import (
    build_source,
    decode_sample,
    get_reasons,
    make_cloud,
    make_film,
    make_npy,
    make_photo,
    make_tone,
    make_turns,
    read_samples,
    to_json,
)

from onellm_dist.common.errors import UsageError
from onellm_dist.shards import build_dataset
from onellm_dist.shards.build.task import TooManyFailuresError

RECIPE = Path(__file__).parents[3] / "shards/reference_lists.yaml"


def pt() -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(make_cloud(64).T.copy()), buffer)
    return buffer.getvalue()


FMRI = make_npy(np.random.default_rng(0).normal(size=15724).astype(np.float32))
MAPS: dict[str, bytes | str] = {
    "cc3m/0/1.jpg": make_photo(),
    "cc3m_depth/0/1.jpg": make_photo(seed=1),
    "cc3m_normal/0/1.jpg": make_photo(seed=2),
}


@pytest.mark.parametrize(
    ("modality", "url", "files", "parts"),
    [
        ("image", "a/1.jpg", {"a/1.jpg": make_photo()}, {"jpg": make_photo()}),
        ("video", "v/1.mp4", {"v/1.mp4": make_film()}, {"mp4": make_film()}),
        ("audio", "s/1.flac", {"s/1.flac": make_tone()}, {"flac": make_tone()}),
        (
            "point",
            "p/1_8192.npy",
            {"p/1_8192.npy": make_npy(make_cloud(64))},
            {"point.npy": make_npy(make_cloud(64))},
        ),
        ("point", "p/1.pt", {"p/1.pt": pt()}, {"npy": make_npy(make_cloud(64))}),
        (
            "depth",
            "x/cc3m/0/1.jpg",
            {f"x/{k}": v for k, v in MAPS.items()},
            {"jpg": make_photo(), "depth.jpg": make_photo(seed=1)},
        ),
        (
            "normal",
            "x/cc3m/0/1.jpg",
            {f"x/{k}": v for k, v in MAPS.items()},
            {"jpg": make_photo(), "normal.jpg": make_photo(seed=2)},
        ),
        ("fmri", "f/1.npy", {"f/1.npy": FMRI}, {"fmri.npy": FMRI}),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
@pytest.mark.seconds
def test_pretraining_lists(
    tmp_path: Path, modality: str, url: str, files: dict[str, bytes | str], parts: dict[str, bytes]
) -> None:
    write_tree(tmp_path / "data", files)
    write_tree(
        tmp_path / "in", {"train.csv": f'url\tcaption\textra\n{url}\tsays "hello", twice\tkept\n'}
    )
    _, dataset = build_source(
        "reference-lists",
        tmp_path / "in",
        tmp_path / "out",
        modality=modality,
        root=str(tmp_path / "data"),
    )
    found = read_samples(dataset)
    assert found == {
        "train/000000002": {
            "txt": 'says "hello", twice',
            "json": {"url": url, "extra": "kept"},
            **parts,
        }
    }
    assert dataset.modalities == (modality,)
    assert torch.isfinite(decode_sample(dataset, "train/000000002")[modality]).all()


def test_instruction_lists_have_their_path_under_image_whatever_it_is(tmp_path: Path) -> None:
    conversation = make_turns(
        "<image>\nWhat is heard?", "A tone.", "How long?\n<image>", "A second."
    )
    rows = [{"id": 7, "image": "InstructionTuning/audio/1.flac", "conversations": conversation}]
    tree = write_tree(
        tmp_path / "in",
        {
            "lists/audio_conversation.json": to_json(rows),
            "InstructionTuning/audio/1.flac": make_tone(),
        },
    )
    _, dataset = build_source(
        "reference-lists",
        tree / "lists/audio_conversation.json",
        tmp_path / "out",
        modality="audio",
        root=str(tree),
    )
    found = read_samples(dataset)["audio_conversation/000000000"]
    assert found["flac"] == make_tone()
    clean = make_turns("What is heard?", "A tone.", "How long?", "A second.")
    assert found["json"] == {
        "id": 7,
        "image": "InstructionTuning/audio/1.flac",
        "conversations": clean,
    }
    assert "txt" not in found


def test_maps_of_instruction_lists_have_a_key_of_their_own_and_text_has_no_file(
    tmp_path: Path,
) -> None:
    rows = [
        {
            "id": 1,
            "image": "a.jpg",
            "depth_image": "maps/a.png",
            "conversations": make_turns("What?", "A disc."),
        }
    ]
    tree = write_tree(
        tmp_path / "in",
        {"depth.json": to_json(rows), "a.jpg": make_photo(), "maps/a.png": make_photo(kind="PNG")},
    )
    _, dataset = build_source(
        "reference-lists", tree / "depth.json", tmp_path / "out", modality="depth"
    )
    assert read_samples(dataset)["depth/000000000"]["depth.png"] == make_photo(kind="PNG")
    write_tree(
        tmp_path / "text",
        {"sharegpt.json": to_json([{"id": 1, "conversations": make_turns("Hi", "Hello")}])},
    )
    _, dataset = build_source(
        "reference-lists", tmp_path / "text", tmp_path / "texts", modality="text"
    )
    assert read_samples(dataset)["sharegpt/000000000"]["json"]["conversations"] == make_turns(
        "Hi", "Hello"
    )


def test_the_authors_storage_is_replaced_and_may_be_a_store(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.pipe_file("/laion/0/1.jpg", make_photo())
    write_tree(tmp_path / "in", {"a.csv": "caption\turl\nx\tcluster:s3://laion400m/0/1.jpg\n"})
    _, dataset = build_source(
        "reference-lists",
        tmp_path / "in",
        tmp_path / "out",
        modality="image",
        replace="cluster:s3://laion400m=memory://laion",
    )
    assert read_samples(dataset)["a/000000002"]["jpg"] == make_photo()
    store.rm("/laion", recursive=True)


def test_splits_follow_the_lists_names_and_keys_their_rows(tmp_path: Path) -> None:
    line = "caption\turl\nx\t../1.jpg\n"
    tree: dict[str, bytes | str] = {
        "lists/val_sub01.csv": line,
        "lists/train_sub01.csv": line,
        "lists/deep/test.tsv": line,
        "1.jpg": make_photo(),
    }
    write_tree(tmp_path / "in", tree)
    _, dataset = build_source(
        "reference-lists",
        tmp_path / "in/lists",
        tmp_path / "out",
        modality="image",
        follow=str(tmp_path / "in"),
    )
    assert {s: list(read_samples(dataset, s)) for s in ("train", "val", "test")} == {
        "train": ["train_sub01/000000002"],
        "val": ["val_sub01/000000002"],
        "test": ["deep/test/000000002"],
    }


def test_bad_rows_are_left_out_one_by_one(tmp_path: Path) -> None:
    lines = [
        "caption\turl",
        "good\t1.jpg",
        "three\tcells\there",
        "\t1.jpg",
        "gone\t2.jpg",
        "what\t1.exe",
        "no file\t",
        "half\t3.jpg",
    ]
    write_tree(
        tmp_path / "in",
        {"a.csv": "\n".join(lines), "1.jpg": make_photo(), "3.jpg": make_photo()[:100]},
    )
    report, dataset = build_source(
        "reference-lists", tmp_path / "in", tmp_path / "out", modality="image", max_failures=0.9
    )
    assert list(read_samples(dataset)) == ["a/000000002"]
    found = {q.file: q.reason for q in report.quarantined}
    assert found["a.csv:3"] == "unreadable row: 3 columns where the header has 2"
    assert found["a.csv:4"] == "empty caption"
    assert found["a.csv:5"].startswith("missing file")
    assert found["a.csv:6"] == "unknown kind of file: 1.exe"
    assert found["a.csv:7"] == "unreadable row: it names no file"
    assert found["a.csv:8"].startswith("unreadable image")
    with pytest.raises(TooManyFailuresError):
        build_dataset(
            "reference-lists", tmp_path / "in", tmp_path / "other", options={"modality": "image"}
        )

    rows: list[Any] = [
        {"image": "1.jpg", "conversations": make_turns("a", "b")},
        {"image": "1.jpg", "conversations": "hi"},
        3,
        {"image": "1.jpg"},
    ]
    write_tree(tmp_path / "json", {"a.json": json.dumps(rows), "1.jpg": make_photo()})
    report, dataset = build_source(
        "reference-lists", tmp_path / "json", tmp_path / "b", modality="image", max_failures=0.9
    )
    assert list(read_samples(dataset)) == ["a/000000000"]
    assert {k: r.split(":")[0] for k, r in get_reasons(report).items()} == {
        "a/000000001": "malformed conversations",
        "a/000000002": "unreadable row",
        "a/000000003": "no caption",
    }
    write_tree(
        tmp_path / "maps", {"a.csv": "caption\turl\nx\tother/1.jpg\n", "other/1.jpg": make_photo()}
    )
    with pytest.raises(
        TooManyFailuresError, match=r"nothing says where the depth map of other/1.jpg is"
    ):
        build_dataset(
            "reference-lists", tmp_path / "maps", tmp_path / "c", options={"modality": "depth"}
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs -o modality=NAME"),
        ({"modality": "imu"}, "use source ego4d-imu"),
        ({"modality": "smell"}, "smell"),
        ({"modality": "image", "replace": "a"}, "'a' is not OLD=NEW"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, str], message: str) -> None:
    write_tree(tmp_path / "in", {"a.csv": "caption\turl\nx\t1.jpg\n"})
    with pytest.raises(Exception, match=message):
        build_dataset("reference-lists", tmp_path / "in", tmp_path / "out", options=options)


def test_other_tables_are_refused(tmp_path: Path) -> None:
    write_tree(tmp_path / "in", {"a.csv": "file,text\n1,2\n"})
    with pytest.raises(UsageError, match=r"a.csv: its columns are file,text"):
        build_dataset(
            "reference-lists", tmp_path / "in", tmp_path / "out", options={"modality": "image"}
        )
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match=r"has no .csv, .tsv, .json"):
        build_dataset(
            "reference-lists", tmp_path / "none", tmp_path / "out", options={"modality": "image"}
        )


def test_the_recipe_builds(tmp_path: Path) -> None:
    tree = write_tree(
        tmp_path / "in", {"a.csv": "caption\turl\na tone\ts/1.flac\n", "s/1.flac": make_tone()}
    )
    _, report = build_recipe(
        RECIPE, inputs=str(tree), out=str(tmp_path / "out"), root=str(tree), workers=1
    )
    assert report.samples == 1
