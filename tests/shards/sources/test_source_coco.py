"""`onellm shards build coco | coco-karpathy`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from shard_worlds import write_tree
from source_checks import (
    build_source,
    decode_sample,
    get_reasons,
    make_photo,
    make_turns,
    read_samples,
    to_json,
)

from onellm_dist.common.errors import OneLLMError

PROMPT = "Provide a one-sentence caption for the provided image."


def official() -> dict[str, Any]:
    """captions_train2017.json."""
    images = [
        {
            "license": 3,
            "file_name": f"{n:012d}.jpg",
            "coco_url": "u",
            "height": 48,
            "width": 64,
            "id": n,
        }
        for n in (9, 25)
    ]
    rows = [
        (9, 661611, "Closeup of bins of food. "),
        (25, 122312, "A giraffe é eating."),
        (9, 661977, "A meal."),
    ]
    annotations = [{"image_id": p, "id": i, "caption": c} for p, i, c in rows]
    return {"info": {}, "licenses": [{"id": 1}], "images": images, "annotations": annotations}


def pictures() -> dict[str, bytes | str]:
    return {
        "train2017/000000000009.jpg": make_photo(seed=9),
        "train2017/000000000025.jpg": make_photo(seed=25),
    }


def test_official_captions(tmp_path: Path) -> None:
    inputs = write_tree(
        tmp_path / "in", {**pictures(), "annotations/captions_train2017.json": to_json(official())}
    )
    report, dataset = build_source("coco", inputs, tmp_path / "out")
    found = read_samples(dataset)
    assert not report.quarantined
    assert dataset.manifest.text == ("txt", "json")
    assert {k: (s["txt"], s["jpg"]) for k, s in found.items()} == {
        "661611": ("Closeup of bins of food.", make_photo(seed=9)),
        "122312": ("A giraffe é eating.", make_photo(seed=25)),
        "661977": ("A meal.", make_photo(seed=9)),
    }
    assert found["661977"]["json"] == {
        "image_id": 9,
        "conversations": make_turns(PROMPT, "A meal."),
    }
    assert decode_sample(dataset, "122312")["image"].shape == (3, 224, 224)


def test_bad_rows(tmp_path: Path) -> None:
    value = official()
    value["annotations"] += [
        {"image_id": 9, "id": 1, "caption": " "},
        {"image_id": 10, "id": 2, "caption": "no picture"},
        {"id": 3},
    ]
    inputs = write_tree(tmp_path / "in", {**pictures(), "captions_train2017.json": to_json(value)})
    report, dataset = build_source("coco", inputs, tmp_path / "out", max_failures=0.5)
    assert len(read_samples(dataset)) == 3
    assert list(get_reasons(report).values()) == [
        "unreadable row: caption is ' ', not a text",
        "missing file: train2017/000000000010.jpg",
        "unreadable row: no 'caption'",
    ]
    with pytest.raises(OneLLMError, match="bad samples: "):
        build_source("coco", inputs, tmp_path / "none")
    (inputs / "captions_train2017.json").write_text(to_json(official())[:-30])
    with pytest.raises(OneLLMError, match=r"captions_train2017\.json: at byte \d+"):
        build_source("coco", inputs, tmp_path / "cut")


def test_karpathys_splits(tmp_path: Path) -> None:
    def row(number: int, split: str, folder: str, *raw: Any) -> dict[str, Any]:
        sentences = [
            {"tokens": str(r).split(), "raw": r, "imgid": 0, "sentid": number * 10 + i}
            for i, r in enumerate(raw)
        ]
        return {
            "filepath": folder,
            "sentids": [],
            "filename": f"COCO_{folder}_{number:012d}.jpg",
            "imgid": 0,
            "split": split,
            "sentences": sentences,
            "cocoid": number,
        }

    rows = [
        row(9, "train", "train2014", "one", "two"),
        row(30, "restval", "val2014", "three"),
        row(31, "val", "val2014", "four"),
        row(32, "test", "val2014", "five", "six"),
        row(9, "train", "train2014", "seven", 8),
        row(33, "none", "x", "nine"),
    ]
    rows[4]["sentences"][0]["sentid"] = 500
    files = {
        **pictures(),
        "dataset_coco.json": to_json({"images": rows, "dataset": "coco"}),
        **{f"val2014/COCO_val2014_{n:012d}.jpg": make_photo(seed=n) for n in (30, 31, 32)},
    }
    inputs = write_tree(tmp_path / "in", files)
    report, dataset = build_source(
        "coco-karpathy", inputs, tmp_path / "out", splits="train,val,test", max_failures=0.5
    )
    captions = {
        s: {k: v["txt"] for k, v in read_samples(dataset, s).items()}
        for s in ("train", "val", "test")
    }
    assert captions == {
        "train": {"90": "one", "91": "two", "300": "three"},
        "val": {"310": "four"},
        "test": {"320": "five", "321": "six"},
    }
    assert read_samples(dataset)["300"]["jpg"] == make_photo(seed=30)
    assert get_reasons(report) == {
        "dataset_coco_json-4": "unreadable row: a caption is 8, not a text",
        "dataset_coco_json-4-1": "unreadable row: a caption is 8, not a text",
        "dataset_coco_json-5": "unreadable row: its split is 'none', "
        "not one of train, restval, val, test",
    }


def test_captions_joined_by_their_picture(tmp_path: Path) -> None:
    """`join=true`: a picture once with all its captions; training reads one in each epoch."""
    inputs = write_tree(
        tmp_path / "in", {**pictures(), "annotations/captions_train2017.json": to_json(official())}
    )
    _, dataset = build_source("coco", inputs, tmp_path / "out", join=True)
    found = read_samples(dataset)
    assert {k: (s["json"]["caption"], s["json"]["rows"]) for k, s in found.items()} == {
        "661611": (["Closeup of bins of food. ".strip(), "A meal."], ["661611", "661977"]),
        "122312": (["A giraffe é eating."], ["122312"]),
    }
    assert "txt" not in found["661611"]
    assert found["661611"]["json"]["conversations"] == make_turns(
        PROMPT, "Closeup of bins of food."
    )
    assert dataset.manifest.text == ("json",)
