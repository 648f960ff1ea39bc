"""`onellm shards build refcoco | refcoco+ | refcocog | vg`: regions of pictures."""

from __future__ import annotations

import os
import pickle
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

from onellm_dist.common.errors import OneLLMError, UsageError

REGION = "Provide a short description for this region."


def ref(number: int, split: str, picture: int, *raw: str, **more: Any) -> dict[str, Any]:
    sentences = [
        {"tokens": r.split(), "raw": r, "sent_id": number * 10 + i, "sent": r.lower()}
        for i, r in enumerate(raw)
    ]
    return {
        "sent_ids": [s["sent_id"] for s in sentences],
        "file_name": f"COCO_train2014_{picture:012d}_{number}.jpg",
        "ann_id": number,
        "ref_id": number,
        "image_id": picture,
        "split": split,
        "sentences": sentences,
        "category_id": 1,
        **more,
    }


def instances() -> dict[str, Any]:
    """RefCOCO's instances.json; picture 9 is 64 x 48."""
    boxes = {1: [16, 12, 32, 24], 2: [0, 0, 64, 48], 3: [8, 8, 0, 10]}
    return {
        "info": {},
        "licenses": [],
        "categories": [{"id": 1, "name": "person"}],
        "images": [
            {"id": n, "file_name": f"COCO_train2014_{n:012d}.jpg", "height": 48, "width": 64}
            for n in (9, 25)
        ],
        "annotations": [
            {
                "id": i,
                "image_id": 9,
                "bbox": b,
                "category_id": 1,
                "segmentation": [[1.5, 2.0]],
                "area": 1,
            }
            for i, b in boxes.items()
        ],
    }


def refer(root: Path, refs: Any, name: str = "refcoco", by: str = "unc", protocol: int = 2) -> Path:
    """The REFER tool's data/."""
    return write_tree(
        root,
        {
            f"{name}/refs({by}).p": pickle.dumps(refs, protocol=protocol),
            f"{name}/instances.json": to_json(instances()),
            "images/mscoco/images/train2014/COCO_train2014_000000000009.jpg": make_photo(seed=9),
        },
    )


@pytest.mark.parametrize(
    ("name", "by", "protocol"),
    [("refcoco", "unc", 0), ("refcoco+", "unc", 2), ("refcocog", "umd", 4)],
)
def test_expressions(tmp_path: Path, name: str, by: str, protocol: int) -> None:
    refs = [
        ref(1, "train", 9, "Left Man", "man in red"),
        ref(2, "testA", 9, "everything"),
        ref(2, "train", 9, "the whole", "all", ref_id=7),
    ]
    refs[2]["sentences"][0]["sent_id"], refs[2]["sentences"][1]["sent_id"] = 70, 71
    report, dataset = build_source(
        name,
        refer(tmp_path / "in", refs, name, by, protocol),
        tmp_path / "out",
        splits="train,testA",
    )
    found = read_samples(dataset)
    assert not report.quarantined
    assert {k: s["json"]["conversations"] for k, s in found.items()} == {
        "10": make_turns(f"{REGION} [0.25, 0.25, 0.75, 0.75]", "Left Man"),
        "11": make_turns(f"{REGION} [0.25, 0.25, 0.75, 0.75]", "man in red"),
        "70": make_turns(f"{REGION} [0.00, 0.00, 1.00, 1.00]", "the whole"),
        "71": make_turns(f"{REGION} [0.00, 0.00, 1.00, 1.00]", "all"),
    }
    assert {k: v for k, v in found["70"]["json"].items() if k != "conversations"} == {
        "image_id": 9,
        "ann_id": 2,
        "ref_id": 7,
    }
    assert list(read_samples(dataset, "testA")) == ["20"]
    assert decode_sample(dataset, "10")["image"].std() > 0.1


def test_python_2s_pickle(tmp_path: Path) -> None:
    """The real refs were written by Python 2: texts are byte strings there (opcode U)."""
    word = b"U\x05caf\xc3\xa9"
    sentence = b"(dU\x03raw" + word + b"sU\x07sent_idI5\ns"
    row = (
        b"(dU\x05splitU\x05trainsU\x08image_idI9\nsU\x06ann_idI1\nsU\x09sentences(l"
        + sentence
        + b"as"
    )
    inputs = refer(tmp_path / "in", [])
    (inputs / "refcoco/refs(unc).p").write_bytes(b"\x80\x02(l" + row + b"a.")
    _, dataset = build_source("refcoco", inputs, tmp_path / "out")
    assert read_samples(dataset)["5"]["json"]["conversations"][1]["value"] == "café"


class _Harm:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, ("harmed",)


def test_a_pickle_with_code_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in ([_Harm()], _Harm()):
        with pytest.raises(
            UsageError, match=r"not a pickle of plain values: it refers to posix\.mkdir"
        ):
            build_source("refcoco", refer(tmp_path / "in", content), tmp_path / "out")
    assert not (tmp_path / "harmed").exists()
    whole = pickle.dumps([ref(1, "train", 9, "x")])
    (tmp_path / "in/refcoco/refs(unc).p").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="is not a pickle of plain values"):
        build_source("refcoco", tmp_path / "in", tmp_path / "out")
    (tmp_path / "in/refcoco/refs(unc).p").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UsageError, match="holds a dict, not a list"):
        build_source("refcoco", tmp_path / "in", tmp_path / "out")


def test_bad_expressions(tmp_path: Path) -> None:
    refs = [
        ref(1, "train", 9, "good"),
        ref(3, "train", 9, "an empty box"),
        ref(9, "train", 9, "no such object"),
        ref(2, "train", 25, "no picture"),
        "row",
        ref(1, "train", 9, " ", "second"),
        ref(1, "nosplit", 9, "x"),
    ]
    report, dataset = build_source(
        "refcoco", refer(tmp_path / "in", refs), tmp_path / "out", max_failures=0.95
    )
    assert list(read_samples(dataset)) == ["10"]
    assert [r.split(": ", 1)[1] for r in get_reasons(report).values()] == [
        "a box of 0 x 10 in a picture of 64 x 48",
        "instances.json has no object 9 or no picture 9",
        "train2017/000000000025.jpg",
        "a str, not an object",
        "an expression is ' ', not a text",
        "an expression is ' ', not a text",
        "its split is 'nosplit', not one of train, val, test, testA, testB",
    ]
    with pytest.raises(OneLLMError, match="bad samples: "):
        build_source("refcoco", tmp_path / "in", tmp_path / "none")


def test_visual_genome(tmp_path: Path) -> None:
    def regions(picture: int, count: int) -> dict[str, Any]:
        listed = [
            {
                "region_id": 100 * picture + i,
                "width": 32,
                "height": 12,
                "image_id": picture,
                "phrase": f"thing {i}" if i != 1 else " ",
                "y": 0,
                "x": 2 * i,
            }
            for i in range(count)
        ]
        return {"id": picture, "regions": listed}

    rows = [regions(1, 3), regions(2, 41), regions(3, 2), regions(4, 0), regions(5, 1)]
    sizes = [
        {"image_id": n, "width": 64, "height": 48, "url": "u", "coco_id": None, "flickr_id": None}
        for n in (1, 2, 4, 5)
    ]
    files: dict[str, bytes | str] = {
        "region_descriptions.json": to_json(rows),
        "image_data.json": to_json(sizes),
        "VG_100K/1.jpg": make_photo(seed=1),
        "VG_100K_2/2.jpg": make_photo(seed=2),
    }
    inputs = write_tree(tmp_path / "in", files)
    report, dataset = build_source("vg", inputs, tmp_path / "out", max_failures=0.7)
    found = read_samples(dataset)
    assert found["1"]["json"]["conversations"] == make_turns(
        f"{REGION} [0.00, 0.00, 0.50, 0.25]",
        "thing 0",
        f"{REGION} [0.06, 0.00, 0.56, 0.25]",
        "thing 2",
    )
    # 40 phrases, ten of them, evenly spread.
    answers = [t["value"] for t in found["2"]["json"]["conversations"][1::2]]
    assert answers == ["thing 0", *(f"thing {i * 4 + 1}" for i in range(1, 10))]
    assert (found["1"]["jpg"], found["2"]["jpg"]) == (make_photo(seed=1), make_photo(seed=2))
    assert list(get_reasons(report).values()) == [
        "unreadable row: image_data.json has no picture 3",
        "unreadable row: no region has a phrase",
        "missing file: VG_100K/5.jpg",
    ]
    _, all_of_them = build_source("vg", inputs, tmp_path / "all", max_failures=0.7, regions=0)
    assert len(read_samples(all_of_them)["2"]["json"]["conversations"]) == 80
