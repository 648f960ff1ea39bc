"""`onellm shards build gqa-eval | vqav2-eval | okvqa-eval | textvqa-eval | vizwiz-eval IN OUT`.

Open questions about pictures, from the official files:

| source | files | pictures |
|---|---|---|
| gqa-eval | testdev_balanced_questions.json | images/ |
| vqav2-eval | v2_OpenEnded_mscoco_val2014_questions.json and annotations | COCO's |
| okvqa-eval | OpenEnded_mscoco_val2014_questions.json and annotations | COCO's |
| textvqa-eval | TextVQA_0.5.1_val.json | train_images/ |
| vizwiz-eval | val.json | val/ |

The test splits of VQAv2, TextVQA and VizWiz have no answers; they give files for the servers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from onellm_dist.shards.sources.readers.benchmarks import (
    BenchmarkFiles,
    BenchmarkRow,
    BenchmarkSet,
)
from onellm_dist.shards.sources.readers.coco_pictures import COCO_FOLDERS


def _read_gqa(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    listed = files.load_json(
        "{split}_balanced_questions.json", "questions/{split}_balanced_questions.json"
    )
    for key, row in listed.items():
        image = str(row["imageId"])
        labels = {"structural type": row["types"]["structural"]} if "types" in row else {}
        record = {
            "id": str(key),
            "text": row["question"],
            "answers": [row["answer"]] if "answer" in row else [],
            "labels": labels,
            "extra": {"questionId": str(key)},
            "medium": image,
        }
        yield BenchmarkRow(record, image, {"image": [f"{image}.jpg"]})


def _list_coco_names(split: str, number: int) -> list[str]:
    year = {"val": "val2014", "train": "train2014"}.get(split, "test2015")
    flat = f"COCO_{year}_{number:012d}.jpg"
    later = [f"{folder}2017/{number:012d}.jpg" for folder in ("val", "train")]
    return [f"{year}/{flat}", flat, *later, f"{number:012d}.jpg"]


def _read_vqa(files: BenchmarkFiles, prefix: str) -> Iterator[BenchmarkRow]:
    year = {"val": "val2014", "test-dev": "test-dev2015", "test": "test2015"}[files.split]
    folders = ("", "questions/", "annotations/")
    questions = files.load_json(
        *(f"{f}{prefix}OpenEnded_mscoco_{year}_questions.json" for f in folders)
    )["questions"]
    annotated: dict[int, Any] = {}
    if files.split == "val":
        rows = files.load_json(*(f"{f}{prefix}mscoco_{year}_annotations.json" for f in folders))
        annotated = {int(row["question_id"]): row for row in rows["annotations"]}
    for question in questions:
        number, image = int(question["question_id"]), int(question["image_id"])
        row = annotated[number] if annotated else None
        record = {
            "id": str(number),
            "text": question["question"],
            "answers": [str(a["answer"]) for a in row["answers"]] if row else [],
            "labels": _get_types(row) if row else {},
            "extra": {"question_id": number},
            "medium": str(image),
        }
        yield BenchmarkRow(record, str(image), {"image": _list_coco_names(files.split, image)})


def _get_types(row: Mapping[str, Any]) -> dict[str, str]:
    names = {"answer_type": "answer type", "question_type": "question type"}
    return {table: str(row[key]) for key, table in names.items() if key in row}


def _read_textvqa(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    for row in files.load_json("TextVQA_0.5.1_{split}.json")["data"]:
        image, number = str(row["image_id"]), int(row["question_id"])
        record = {
            "id": str(number),
            "text": row["question"],
            "answers": list(row.get("answers", [])),
            "extra": {"question_id": number},
            "medium": image,
        }
        names = [f"{folder}{image}.jpg" for folder in ("train_images/", "test_images/", "")]
        yield BenchmarkRow(record, image, {"image": names})


def _read_vizwiz(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    for row in files.load_json("{split}.json", "Annotations/{split}.json"):
        image = str(row["image"])
        labels = {"answer type": str(row["answer_type"])} if "answer_type" in row else {}
        record = {
            "id": image,
            "text": row["question"],
            "answers": [str(a["answer"]) for a in row.get("answers", [])],
            "labels": labels,
            "extra": {"image": image},
            "medium": image,
        }
        yield BenchmarkRow(record, image, {"image": [f"{files.split}/{image}", image]})


def _make_vqa(
    name: str, title: str, prefix: str, splits: Mapping[str, tuple[int, ...]]
) -> BenchmarkSet:
    return BenchmarkSet(
        name,
        f"{title}: the official questions and answers, COCO's pictures",
        ("image",),
        splits,
        lambda files: _read_vqa(files, prefix),
        folders=COCO_FOLDERS,
        licence="CC-BY 4.0 (annotations); COCO's pictures under Flickr's terms",
    )


SOURCES = tuple(
    benchmark.make_source()
    for benchmark in (
        BenchmarkSet(
            "gqa",
            "GQA: {split}_balanced_questions.json and images/",
            ("image",),
            {"testdev": (12_578,)},
            _read_gqa,
            folders=("images", "gqa/images"),
            licence="CC-BY 4.0",
        ),
        _make_vqa(
            "vqav2",
            "VQAv2",
            "v2_",
            {"val": (214_354,), "test-dev": (107_394,), "test": (447_793,)},
        ),
        _make_vqa("okvqa", "OK-VQA", "", {"val": (5_046,)}),
        BenchmarkSet(
            "textvqa",
            "TextVQA_0.5.1_{val,test}.json and train_images/",
            ("image",),
            {"val": (5_000,), "test": (5_734,)},
            _read_textvqa,
            folders=("train_val_images",),
            licence="CC-BY 4.0",
        ),
        BenchmarkSet(
            "vizwiz",
            "VizWiz: {val,test}.json and pictures",
            ("image",),
            {"val": (4_319,), "test": (8_000,)},
            _read_vizwiz,
            folders=("images",),
            licence="CC-BY 4.0",
        ),
    )
)
