"""Rows of the benchmarks of pictures and of questions on films, as published."""

from __future__ import annotations

import base64
import json
from typing import Any

from benchmark_files import CAPTIONS, ROWS, Files, coco_form, films, photos, table
from source_checks import make_film, make_photo


def gqa() -> Files:
    rows = {
        f"q{i}": {
            "imageId": f"n{i // 2}",
            "question": f"Is it {i}?",
            "answer": ("yes", "no", "left", "red")[i],
            "types": {"structural": ("verify", "query")[i % 2]},
        }
        for i in range(ROWS)
    }
    return {"testdev_balanced_questions.json": json.dumps(rows), **photos("images/n{}.jpg", 2)}


def vqa(prefix: str) -> Files:
    answers = [["2"] * 10, ["yes"] * 6 + ["no"] * 4, ["a dog"] * 9 + ["cat"], ["blue"] * 10]
    questions = [
        {"question_id": 10 + i, "image_id": 1 + i // 2, "question": f"What is {i}?"}
        for i in range(ROWS)
    ]
    annotations = [
        {
            "question_id": 10 + i,
            "image_id": 1 + i // 2,
            "answer_type": ("number", "yes/no", "other", "other")[i],
            "question_type": "what is",
            "answers": [{"answer_id": j, "answer": a} for j, a in enumerate(given)],
        }
        for i, given in enumerate(answers)
    ]
    pictures = {f"val2014/COCO_val2014_{i:012d}.jpg": make_photo(seed=i) for i in (1, 2)}
    return {
        f"{prefix}OpenEnded_mscoco_val2014_questions.json": json.dumps({"questions": questions}),
        f"{prefix}mscoco_val2014_annotations.json": json.dumps({"annotations": annotations}),
        **pictures,
    }


def textvqa() -> Files:
    rows = [
        {
            "question_id": i,
            "image_id": f"im{i // 2}",
            "question": f"what does sign {i} say?",
            "answers": [("stop", "exit 5", "nokia", "12:30")[i]] * 10,
        }
        for i in range(ROWS)
    ]
    return {"TextVQA_0.5.1_val.json": json.dumps({"data": rows}), **photos("train_images/im{}.jpg")}


def vizwiz() -> Files:
    rows = [
        {
            "image": f"VizWiz_val_{i}.jpg",
            "question": f"What is this {i}?",
            "answers": [
                {
                    "answer": ("unanswerable", "soup", "keyboard", "grey")[i],
                    "answer_confidence": "yes",
                }
            ]
            * 10,
            "answer_type": ("unanswerable", "other", "other", "other")[i],
            "answerable": int(i > 0),
        }
        for i in range(ROWS)
    ]
    return {"val.json": json.dumps(rows), **photos("val/VizWiz_val_{}.jpg")}


def scienceqa() -> Files:
    problems = {
        str(i): {
            "question": f"Which is {i}?",
            "choices": ["one", "two", "three"][: 2 + i % 2],
            "answer": i % 2,
            "hint": "Look." if i else "",
            "image": "image.png" if i != 3 else None,
            "subject": "natural science",
            "topic": "physics",
            "grade": f"grade{i}",
        }
        for i in range(ROWS)
    }
    splits = {"test": ["0", "1", "2", "3"], "train": []}
    return {
        "problems.json": json.dumps(problems),
        "pid_splits.json": json.dumps(splits),
        **photos("images/test/{}/image.png", 3),
    }


def mmbench() -> Files:
    head = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "l2-category",
    ]
    rows: list[list[Any]] = [head]
    for i, count in enumerate((4, 2)):
        options = [f"thing {i}{j}" for j in range(count)]
        cell = base64.b64encode(make_photo(seed=i)).decode()
        for shift in range(count):
            shifted = [options[(j + shift) % count] for j in range(count)]
            right = "ABCD"[(1 - shift) % count]
            rows.append(
                [
                    i + 1_000_000 * shift,
                    f"Which thing {i}?",
                    "nan",
                    *[*shifted, "", ""][:4],
                    right,
                    ("ocr", "scene")[i],
                    cell if shift == 0 else str(i),
                    "coarse",
                ]
            )
    return {"MMBench_DEV_EN.tsv": table(rows, "\t")}


def mmvet() -> Files:
    rows = {
        f"v1_{i}": {
            "imagename": f"v1_{i}.jpg",
            "question": f"Explain {i}.",
            "answer": f"x = {i}<AND>y",
            "capability": ["ocr", "math"][: 1 + i % 2],
        }
        for i in range(ROWS)
    }
    return {"mm-vet.json": json.dumps(rows), **photos("images/v1_{}.jpg")}


def seedbench() -> Files:
    questions = [
        {
            "question_id": f"{i}_0",
            "question_type_id": 1 + i % 2,
            "data_type": "image" if i < 3 else "video",
            "data_id": f"im_{i}",
            "question": f"What is {i}?",
            **{f"choice_{c}": f"{c}{i}" for c in "abcd"},
            "answer": "ABCD"[i],
        }
        for i in range(ROWS)
    ]
    types = {"Scene Understanding": 1, "Instance Identity": 2}
    content = {"questions": questions, "question_type": types}
    return {"SEED-Bench.json": json.dumps(content), **photos("SEED-Bench-image/im_{}.jpg")}


def nextqa() -> Files:
    head = ["video", "frame_count", "width", "height", "question", "answer", "qid", "type"]
    head += [f"a{i}" for i in range(5)]
    rows = [
        [f"90{i // 2}", 12, 64, 48, f"why {i}?", i, i, ("CW", "CH", "TN", "DO")[i]]
        + [f"reason {i}{j}" for j in range(5)]
        for i in range(ROWS)
    ]
    paths = {"900": "1164/900", "901": "1164/901"}
    return {
        "test.csv": table([head, *rows]),
        "map_vid_vidorID.json": json.dumps(paths),
        **films("videos/1164/90{}.mp4", 2),
    }


def how2qa() -> Files:
    rows = [
        [f"ab{i}", "[7.2:18.0]", f"w{i}", f"x{i}", f"y{i}", f"how many {i}?", f"right{i}"]
        for i in range(ROWS)
    ]
    return {"how2QA_val_release.csv": table(rows), **films("videos/ab{}_7.2_18.mp4")}


def mme() -> Files:
    files: Files = {}
    for task in ("existence", "code_reasoning"):
        for i in range(2):
            lines = [f"Is there a {i}? Please answer yes or no.\tYes", "Is it 3?\tNo"]
            files[f"MME_Benchmark_release_version/{task}/000{i}.txt"] = "\n".join(lines)
            files[f"MME_Benchmark_release_version/{task}/000{i}.jpg"] = make_photo(seed=i)
    folder = "MME_Benchmark_release_version/posters"
    files[f"{folder}/questions_answers_YN/tt1.txt"] = "Is it A?\tNo\nIs it B?\tYes\n"
    files[f"{folder}/images/tt1.jpg"] = make_photo(seed=5)
    return files


def msvd() -> Files:
    rows = [
        {"id": 300 + i, "video_id": 1 + i // 2, "question": f"what is {i}?", "answer": a}
        for i, a in enumerate(("dog", "run", "guitar", "cook"))
    ]
    return {
        "test_qa.json": json.dumps(rows),
        "youtube_mapping.txt": "-4w_0_1 vid1\nab_1_2 vid2\n",
        "YouTubeClips/-4w_0_1.mp4": make_film(seed=1),
        "YouTubeClips/ab_1_2.mp4": make_film(seed=2),
    }


def nocaps() -> Files:
    domains = ("in-domain", "near-domain", "out-domain", "out-domain")
    images = [{"id": i, "file_name": f"0{i}.jpg", "domain": domains[i]} for i in range(ROWS)]
    return {"nocaps_val_4500_captions.json": coco_form(CAPTIONS, images), **photos("val/0{}.jpg")}


def flickr30k() -> Files:
    images = [
        {
            "filename": f"{i}.jpg",
            "split": "test" if i < ROWS else "train",
            "sentences": [{"raw": text} for text in CAPTIONS[i % ROWS]],
        }
        for i in range(ROWS + 1)
    ]
    return {"dataset_flickr30k.json": json.dumps({"images": images}), **photos("images/{}.jpg")}
