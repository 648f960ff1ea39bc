"""Sources vqav2, okvqa, gqa, aokvqa and ocrvqa: the official files, the paper's prompts."""

from __future__ import annotations

import json
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

SHORT = "Answer the question using a single word or phrase."


def vqa(prefix: str = "v2_", *, common: bool = True) -> dict[str, Any]:
    """Questions and annotations as visualqa.org publishes them."""
    questions = [
        {"image_id": p, "question": q, "question_id": p * 1000 + i}
        for p, i, q in (
            (9, 0, "What color is it?"),
            (9, 1, "Is it “big”? "),
            (25, 0, "How many?"),
            (30, 0, "Where?"),
        )
    ]
    answers = {
        9000: ["red"] * 6 + ["dark red"] * 4,
        9001: ["no", "yes", "yes", "no"],
        25000: ["2"] * 10,
        30000: ["here"] * 10,
    }
    annotations = [
        {
            "question_type": "what",
            **({"multiple_choice_answer": max(a, key=a.count)} if common else {}),
            "answer_type": "other",
            "answers": [
                {"answer": t, "answer_confidence": "yes", "answer_id": i + 1}
                for i, t in enumerate(a)
            ],
            "image_id": n // 1000,
            "question_id": n,
        }
        for n, a in answers.items()
    ]
    head = {
        "info": {"description": "d"},
        "license": {"url": "u"},
        "data_subtype": "train2014",
        "data_type": "mscoco",
    }
    return {
        f"{prefix}OpenEnded_mscoco_train2014_questions.json": {
            **head,
            "task_type": "Open-Ended",
            "questions": questions,
        },
        f"{prefix}mscoco_train2014_annotations.json": {**head, "annotations": annotations},
    }


def coco(root: Path, folder: str = "train2014") -> Path:
    """COCO's pictures 9 and 25 of 2014, 30 of 2017."""
    return write_tree(
        root,
        {
            f"{folder}/COCO_train2014_000000000009.jpg": make_photo(seed=9),
            f"{folder}/COCO_train2014_000000000025.jpg": make_photo(seed=25),
            "coco/train2017/000000000030.jpg": make_photo(seed=30),
        },
    )


def as_files(values: dict[str, Any]) -> dict[str, bytes | str]:
    return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


@pytest.mark.parametrize("name", ["vqav2", "okvqa"])
def test_questions_and_annotations(tmp_path: Path, name: str) -> None:
    files = as_files(vqa("v2_" if name == "vqav2" else "", common=name == "vqav2"))
    inputs = write_tree(coco(tmp_path / "in"), files)
    report, dataset = build_source(name, inputs, tmp_path / "out")
    found = read_samples(dataset)
    assert (report.quarantined, dataset.modalities, dataset.manifest.text) == (
        (),
        ("image",),
        ("json",),
    )
    assert list(found) == ["9000", "9001", "25000", "30000"]
    assert found["9000"] == {
        "jpg": make_photo(seed=9),
        "json": {
            "question_id": 9000,
            "image_id": 9,
            "answers": ["red"] * 6 + ["dark red"] * 4,
            "conversations": make_turns(f"What color is it? {SHORT}", "red"),
        },
    }
    # Of answers given equally often, the first.
    assert found["9001"]["json"]["conversations"] == make_turns(f"Is it “big”? {SHORT}", "no")
    assert found["30000"]["jpg"] == make_photo(seed=30)
    assert decode_sample(dataset, "25000")["image"].std() > 0.1


def test_files_that_were_changed_are_read_again(tmp_path: Path) -> None:
    """In one process: what is kept of a file is of the file as it is."""
    files = vqa()
    inputs = write_tree(coco(tmp_path / "in"), as_files(files))
    build_source("vqav2", inputs, tmp_path / "before")
    files["v2_OpenEnded_mscoco_train2014_questions.json"]["questions"][0]["question"] = "Changed?"
    write_tree(inputs, as_files(files))
    _, dataset = build_source("vqav2", inputs, tmp_path / "after")
    assert read_samples(dataset)["9000"]["json"]["conversations"][0]["value"] == f"Changed? {SHORT}"


def test_bad_questions_are_left_out_with_their_reasons(tmp_path: Path) -> None:
    files = vqa()
    rows = files["v2_mscoco_train2014_annotations.json"]["annotations"]
    rows[0].pop("answers")
    rows[1]["multiple_choice_answer"] = " "
    rows[2]["question_id"] = 77
    rows += ["row", {**rows[3], "question_id": 30000, "image_id": 31}]
    inputs = write_tree(coco(tmp_path / "in"), as_files(files))
    (inputs / "coco/train2017/000000000030.jpg").write_bytes(make_photo(seed=30)[:200])
    with pytest.raises(OneLLMError, match="bad samples: "):
        build_source("vqav2", inputs, tmp_path / "none")
    rows.append({**rows[3], "question_id": 25000, "image_id": 25})
    write_tree(inputs, as_files(files))
    report, dataset = build_source("vqav2", inputs, tmp_path / "out", max_failures=0.9)
    assert list(read_samples(dataset)) == ["25000"]
    why = [q.reason for q in report.quarantined]
    assert why[:3] + why[4:] == [
        "unreadable row: no 'answers'",
        "unreadable row: multiple_choice_answer is ' ', not a text",
        "unreadable row: there is no question 77",
        "unreadable row: a str, not an object",
        "missing file: train2017/000000000031.jpg",
    ]
    assert why[3].startswith("unreadable image: .jpg (200 bytes)")
    assert report.quarantined[2].file == "v2_mscoco_train2014_annotations.json[2]"
    fewer, _ = build_source("vqav2", inputs, tmp_path / "skip", max_failures=0.9, missing="skip")
    assert len(fewer.quarantined) == len(report.quarantined) - 1
    assert "left out knowingly: 1 x media was not fetched" in fewer.notes


def test_gqa(tmp_path: Path) -> None:
    rows = {
        "02930152": {
            "semantic": [],
            "entailed": ["x"],
            "question": "Is the sky dark?",
            "imageId": "2354786",
            "answer": "yes",
            "fullAnswer": "Yes, the sky is dark.",
            "isBalanced": True,
            "groups": {"global": None},
        },
        "07333408": {"question": "What is on the wall?", "imageId": "n15740", "answer": "pipe"},
        "bad": {"question": "?", "imageId": "2354786"},
    }
    files: dict[str, bytes | str] = {
        "train_balanced_questions.json": to_json(rows),
        "images/2354786.jpg": make_photo(seed=1),
        "images/n15740.jpg": make_photo(seed=2),
    }
    report, dataset = build_source(
        "gqa", write_tree(tmp_path / "in", files), tmp_path / "out", max_failures=0.4
    )
    found = read_samples(dataset)
    assert {k: (s["jpg"], s["json"]["conversations"]) for k, s in found.items()} == {
        "02930152": (make_photo(seed=1), make_turns(f"Is the sky dark? {SHORT}", "yes")),
        "07333408": (make_photo(seed=2), make_turns(f"What is on the wall? {SHORT}", "pipe")),
    }
    assert get_reasons(report) == {
        "train_balanced_questions_json-bad": "unreadable row: no 'answer'"
    }
    with pytest.raises(UsageError, match="val_balanced_questions"):
        build_source("gqa", tmp_path / "in", tmp_path / "val", splits="val")


def test_aokvqa(tmp_path: Path) -> None:
    row = {
        "split": "train",
        "image_id": 9,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is the man by the bags awaiting?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "correct_choice_idx": 3,
        "direct_answers": ["ride"] * 10,
        "difficult_direct_answer": False,
        "rationales": ["A train would not be there."],
    }
    rows = [
        row,
        {**row, "question_id": "b", "correct_choice_idx": 4},
        {**row, "question_id": "c", "image_id": 77},
    ]
    inputs = write_tree(coco(tmp_path / "in"), {"aokvqa_v1p0_train.json": to_json(rows)})
    report, dataset = build_source("aokvqa", inputs, tmp_path / "out", max_failures=0.7)
    [(key, sample)] = read_samples(dataset).items()
    question = "What is the man by the bags awaiting? A. skateboarder B. train C. delivery D. cab"
    assert key == row["question_id"]
    assert sample["json"]["conversations"] == make_turns(
        f"{question} Answer with the option's letter from the given choices directly", "D"
    )
    assert sample["json"]["choices"] == row["choices"]
    assert sorted(get_reasons(report).values()) == [
        "missing file: train2017/000000000077.jpg",
        "unreadable row: correct_choice_idx is 4 of 4 choices",
    ]


def test_ocrvqa(tmp_path: Path) -> None:
    def book(split: int, url: str = "http://x/51.jpg", **more: Any) -> dict[str, Any]:
        return {
            "imageURL": url,
            "questions": ["Who is the author?", "Is it art?"],
            "answers": ["A. Uthor", "No"],
            "title": "A Title",
            "authorName": "A. Uthor",
            "genre": "Arts",
            "split": split,
            **more,
        }

    rows = {
        "0001": book(1),
        "0002": book(1, "http://x/y.gif"),
        "0003": book(2),
        "0004": book(1, answers=["one"]),
        "0005": 7,
        "0006": book(3),
    }
    files: dict[str, bytes | str] = {
        "dataset.json": to_json(rows),
        **{f"images/000{i}.jpg": make_photo(seed=i) for i in (1, 2, 3, 4, 6)},
    }
    inputs = write_tree(tmp_path / "in", files)
    report, dataset = build_source(
        "ocrvqa", inputs, tmp_path / "out", splits="train,val,test", max_failures=0.7
    )
    expected = make_turns(f"Who is the author? {SHORT}", "A. Uthor", f"Is it art? {SHORT}", "No")
    assert {k: s["json"]["conversations"] for k, s in read_samples(dataset).items()} == {
        "0001": expected,
        "0002": expected,
    }
    assert read_samples(dataset)["0001"]["json"]["title"] == "A Title"
    assert (list(read_samples(dataset, "val")), list(read_samples(dataset, "test"))) == (
        ["0003"],
        ["0006"],
    )
    assert get_reasons(report) == {
        "dataset_json-0004": "unreadable row: 2 questions and 1 answers",
        "dataset_json-0005": "unreadable row: a int, not an object",
    }
    with pytest.raises(UsageError, match="there is no split dev"):
        build_source("ocrvqa", inputs, tmp_path / "dev", splits="dev")


def test_questions_joined_by_their_picture(tmp_path: Path) -> None:
    """`join=true`: a picture once, with all its questions; a bad row affects no other."""
    files = vqa()
    rows = files["v2_mscoco_train2014_annotations.json"]["annotations"]
    rows.append({**rows[0], "question_id": 77})  # about picture 9, without a question
    rows.append("row")
    rows.append({**rows[1], "question_id": 31000, "image_id": 31})  # without a picture
    files["v2_OpenEnded_mscoco_train2014_questions.json"]["questions"].append(
        {"image_id": 31, "question": "?", "question_id": 31000}
    )
    inputs = write_tree(coco(tmp_path / "in"), as_files(files))
    report, dataset = build_source("vqav2", inputs, tmp_path / "out", join="true", max_failures=0.9)
    found = read_samples(dataset)
    assert list(found) == ["9000", "25000", "30000"]
    assert found["9000"]["json"] == {
        "image_id": 9,
        "rows": ["9000", "9001"],
        "question_id": [9000, 9001],
        "answers": [["red"] * 6 + ["dark red"] * 4, ["no", "yes", "yes", "no"]],
        "conversations": make_turns(
            f"What color is it? {SHORT}", "red", f"Is it “big”? {SHORT}", "no"
        ),
    }
    assert found["25000"]["json"]["question_id"] == 25000
    assert sorted(get_reasons(report).values()) == [
        "missing file: train2017/000000000031.jpg",
        "unreadable row: a str, not an object",
        "unreadable row: there is no question 77",
    ]
    assert "left out knowingly: 1 x in the sample of its medium's first row" in report.notes
    _, cut = build_source(
        "vqav2", inputs, tmp_path / "cut", join=True, max_failures=0.9, max_samples=2, name="out"
    )
    assert read_samples(cut) == found

    gqa = {
        f"{i:03d}": {"question": f"Is it {i}?", "imageId": "12"[i % 2], "answer": "yes"}
        for i in range(5)
    }
    inputs = write_tree(
        tmp_path / "gqa",
        {
            "train_balanced_questions.json": to_json(gqa),
            "images/1.jpg": make_photo(),
            "images/2.jpg": make_photo(seed=1),
        },
    )
    _, dataset = build_source("gqa", inputs, tmp_path / "joined", join=True)
    assert {k: s["json"]["rows"] for k, s in read_samples(dataset).items()} == {
        "000": ["000", "002", "004"],
        "001": ["001", "003"],
    }
