"""`onellm shards build scienceqa-eval | mmbench-eval | seedbench-eval | nextqa-eval | how2qa-eval`.

Multiple choice, from the official files:

| source | files | media |
|---|---|---|
| scienceqa-eval | problems.json, pid_splits.json; those with a picture | test/1/image.png |
| mmbench-eval | mmbench_dev_en*.tsv, with its pictures in base64 | in the table |
| seedbench-eval | SEED-Bench.json; the questions about pictures alone | SEED-Bench-image/ |
| nextqa-eval | val.csv or test.csv, map_vid_vidorID.json | videos/ |
| how2qa-eval | how2QA_val_release.csv, in an order that is drawn | videos/ab_7.2_18.mp4 |

The right answers of How2QA stand last in its file, hence another order; its clips must be cut to
the seconds of each question: VIDEO_START_END.mp4.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers.benchmarks import (
    BenchmarkFiles,
    BenchmarkRow,
    BenchmarkSet,
)

LETTERS = "ABCDEFGHIJ"
_INDEX_LENGTH = 64
"""A cell of MMBench of at most this many characters is the index of the row with the picture."""
_CIRCULAR_STEP = 1_000_000
"""The shifted rows of an MMBench question have its index plus multiples of this."""


def make_choice(
    key: str, text: str, options: Sequence[str], right: int | None, medium: str, **others: Any
) -> dict[str, Any]:
    """The record of a question with options.

    Args:
        key: its id.
        text: the question.
        options: texts, A first.
        right: place of the right one; None: it is hidden.
        medium: what the question is about.
        others: `labels` and `extra`.

    Raises:
        ValueError: there is no such option.
    """
    if right is not None and not 0 <= right < len(options):
        raise ValueError(f"question {key}: its answer is option {right} of {len(options)}")
    return {
        "id": key,
        "text": text,
        "options": list(options),
        "answers": [] if right is None else [LETTERS[right]],
        "medium": medium,
        **others,
    }


def _read_scienceqa(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    problems = files.load_json("problems.json")
    wanted = files.load_json("pid_splits.json")[files.split]
    for key in map(str, wanted):
        row = problems[key]
        if not row.get("image"):
            continue
        labels = {k: str(row[k]) for k in ("subject", "topic", "grade") if k in row}
        record = make_choice(
            key,
            row["question"],
            row["choices"],
            int(row["answer"]),
            key,
            labels=labels,
            extra={"hint": row.get("hint") or ""},
        )
        names = [f"{files.split}/{key}/{row['image']}", f"{key}/{row['image']}"]
        yield BenchmarkRow(record, key, {"image": names})


@dataclass(frozen=True)
class EncodedPicture:
    """A picture in base64."""

    text: str

    def read_bytes(self) -> bytes:
        """Decode it.

        Raises:
            BadSampleError: it is not base64.
        """
        try:
            return base64.b64decode(self.text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadSampleError(f"unreadable picture: not base64: {error}") from error


def _read_mmbench(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    names = {"dev": ("MMBench_DEV_EN.tsv", "mmbench_dev_20230712.tsv", "mmbench_dev_en.tsv")}
    tests = ("MMBench_TEST_EN.tsv", "mmbench_test_20230712.tsv", "mmbench_test_en.tsv")
    rows = files.read_table(*names.get(files.split, tests), separator="\t")
    cells = {row["index"]: row["image"] for row in rows}
    groups = {int(row["index"]) % _CIRCULAR_STEP for row in rows}
    circular = any(int(row["index"]) >= _CIRCULAR_STEP for row in rows)
    for row in rows:
        options = [row[letter] for letter in "ABCD" if row.get(letter)]
        orders = range(1) if circular else range(len(options))
        for shift in orders:
            yield _make_mmbench_row(row, options, shift, cells)
    if circular and not groups <= {int(row["index"]) for row in rows}:
        raise ValueError("a question has shifted rows and no first one")


def _make_mmbench_row(
    row: dict[str, str], options: list[str], shift: int, cells: dict[str, str]
) -> BenchmarkRow:
    index = int(row["index"]) + _CIRCULAR_STEP * shift
    group = index % _CIRCULAR_STEP
    right = LETTERS.index(row["answer"]) if row.get("answer") else None
    shifted = [options[(i + shift) % len(options)] for i in range(len(options))]
    labels = {t: row[k] for t, k in (("category", "category"), ("L2", "l2-category")) if row.get(k)}
    cell = cells[row["index"]]
    medium = cell if len(cell) <= _INDEX_LENGTH else str(group)
    record = make_choice(
        str(index),
        row["question"],
        shifted,
        None if right is None else (right - shift) % len(options),
        medium,
        labels=labels,
        extra={
            "group": group,
            "hint": "" if row.get("hint") in (None, "nan") else row["hint"],
            "index": index,
        },
    )
    if len(cell) <= _INDEX_LENGTH:
        cell = cells[cell]
    return BenchmarkRow(record, medium, {"jpg": EncodedPicture(cell)})


def _read_seedbench(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    content = files.load_json("SEED-Bench.json")
    names = {int(number): name for name, number in content["question_type"].items()}
    for row in content["questions"]:
        if row["data_type"] != "image":
            continue
        key, image = str(row["question_id"]), str(row["data_id"])
        record = make_choice(
            key,
            row["question"],
            [row[f"choice_{letter}"] for letter in "abcd"],
            LETTERS.index(row["answer"]),
            image,
            labels={"question type": names[int(row["question_type_id"])]},
            extra={"question_id": key},
        )
        yield BenchmarkRow(record, image, {"image": [image, f"{image}.jpg"]})


def _read_nextqa(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    paths = files.load_json("map_vid_vidorID.json", "dataset/nextqa/map_vid_vidorID.json")
    kinds = {"C": "causal", "T": "temporal", "D": "descriptive"}
    for row in files.read_table("{split}.csv", "dataset/nextqa/{split}.csv"):
        video, key = row["video"], f"{row['video']}_{row['qid']}"
        record = make_choice(
            key,
            row["question"],
            [row[f"a{i}"] for i in range(5)],
            int(row["answer"]),
            video,
            labels={"question": kinds.get(row["type"][:1], row["type"]), "type": row["type"]},
            extra={"key": key},
        )
        yield BenchmarkRow(record, video, {"video": [f"{paths[video]}.mp4", f"{video}.mp4"]})


def _read_how2qa(files: BenchmarkFiles) -> Iterator[BenchmarkRow]:
    """Rows `video,[start:end],wrong,wrong,wrong,question,right`, without a line of names.

    The order of the options is drawn from the id, so that it is the same everywhere.
    """
    head = ("video", "window", "wrong1", "wrong2", "wrong3", "question", "right")
    names = ("how2QA_{split}_release.csv", "how2qa_{split}.csv")
    for number, row in enumerate(files.read_table(*names, head=head)):
        start, end = (float(x) for x in row["window"].strip("[]").split(":"))
        key = f"{row['video']}-{number}"
        options = [row["wrong1"], row["wrong2"], row["wrong3"], row["right"]]
        order = list(range(4))
        seed = hashlib.blake2b(key.encode(), digest_size=8).digest()
        random.Random(int.from_bytes(seed, "little")).shuffle(order)
        medium = f"{row['video']}_{start:g}_{end:g}"
        record = make_choice(
            key,
            row["question"],
            [options[i] for i in order],
            order.index(3),
            medium,
            extra={"start": start, "end": end},
        )
        yield BenchmarkRow(record, medium, {"video": [f"{medium}.mp4", f"{medium}.webm"]})


SOURCES = tuple(
    benchmark.make_source()
    for benchmark in (
        BenchmarkSet(
            "scienceqa",
            "ScienceQA: problems.json, pid_splits.json; the questions with a picture",
            ("image",),
            {"test": (2_017,), "val": ()},
            _read_scienceqa,
            folders=("images",),
            licence="CC-BY-NC-SA 4.0",
        ),
        BenchmarkSet(
            "mmbench",
            "MMBench's tables; every question in every order of its options",
            ("image",),
            {"dev": (4_329, 4_377), "test": (6_666,)},
            _read_mmbench,
            licence="Apache-2.0 (benchmark); pictures of their owners",
        ),
        BenchmarkSet(
            "seedbench",
            "SEED-Bench.json; the questions about pictures",
            ("image",),
            {"test": ()},
            _read_seedbench,
            folders=("SEED-Bench-image",),
            licence="CC-BY-NC 4.0",
        ),
        BenchmarkSet(
            "nextqa",
            "NExT-QA: {val,test}.csv, map_vid_vidorID.json and videos",
            ("video",),
            {"test": (8_564,), "val": (4_996,)},
            _read_nextqa,
            folders=("videos", "NExTVideo"),
            licence="MIT (annotations)",
        ),
        BenchmarkSet(
            "how2qa",
            "How2QA: how2QA_val_release.csv and clips",
            ("video",),
            {"val": (2_852,), "test": (2_937,)},
            _read_how2qa,
            folders=("videos",),
            licence="CC-BY-NC-SA 4.0",
        ),
    )
)
