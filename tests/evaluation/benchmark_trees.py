"""A few rows of each benchmark in its official layout, with real media."""

from __future__ import annotations

import base64
import csv
import io
import json
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image
from scipy.io import savemat

sys.path.insert(0, str(Path(__file__).parents[1] / "shards"))

from shard_worlds import write_tree  # it needs the path above
from source_checks import (
    make_cloud,
    make_film,
    make_npy,
    make_photo,
    make_tone,
)

Files = dict[str, bytes | str]
ROWS = 4


def photos(pattern: str, count: int = ROWS) -> Files:
    """Pictures by number."""
    kind = "PNG" if pattern.endswith("png") else "JPEG"
    return {pattern.format(i): make_photo(seed=i, kind=kind) for i in range(count)}


def films(pattern: str, count: int = ROWS) -> Files:
    return {pattern.format(i): make_film(seed=i) for i in range(count)}


def make_talkie(seed: int = 0) -> bytes:
    """A mp4 with a picture and a tone of a second."""
    buffer = io.BytesIO()
    rate = 16000
    with av.open(buffer, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=Fraction(8))
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio: Any = container.add_stream("aac", rate=rate, layout="mono")
        for i in range(8):
            pixels = np.full((48, 64, 3), 20 * seed + 10 * i, np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(video.encode(None))
        wave = (0.3 * np.sin(np.arange(rate) * (0.1 + seed / 50))).astype(np.float32)
        for start in range(0, rate, 1024):
            frame = av.AudioFrame.from_ndarray(
                wave[None, start : start + 1024], format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = rate, start
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    return buffer.getvalue()


def talkies(pattern: str, count: int = ROWS) -> Files:
    return {pattern.format(i): make_talkie(i) for i in range(count)}


def table(rows: list[list[Any]], separator: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=separator, lineterminator="\n").writerows(rows)
    return out.getvalue()


def coco_form(captions: list[list[str]], images: list[dict[str, Any]]) -> str:
    """COCO's form, with a list of captions for each image."""
    annotations = [
        {"id": 100 * i + j, "image_id": image["id"], "caption": text}
        for i, (image, some) in enumerate(zip(images, captions, strict=True))
        for j, text in enumerate(some)
    ]
    return json.dumps({"images": images, "annotations": annotations})


THINGS = ("a red ball on grass", "two dogs in the snow", "an old train", "people on a beach")
CAPTIONS = [[f"{t} today", f"a picture of {t}", t] for t in THINGS]


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


def vatex() -> Files:
    rows = [{"videoID": f"v{i}_000000_000010", "enCap": CAPTIONS[i]} for i in range(ROWS)]
    return {
        "vatex_public_test_english_v1.1.json": json.dumps(rows),
        **films("videos/v{}_000000_000010.mp4"),
    }


def sounds(pattern: str) -> Files:
    return {pattern.format(i): make_tone("WAV", hertz=300 + 100 * i) for i in range(ROWS)}


def clotho() -> Files:
    head = ["file_name", *(f"caption_{i}" for i in range(1, 6))]
    rows = [[f"s{i}.wav", *CAPTIONS[i], *CAPTIONS[i][:2]] for i in range(ROWS)]
    return {"clotho_captions_evaluation.csv": table([head, *rows]), **sounds("evaluation/s{}.wav")}


def clotho_aqa() -> Files:
    head = ["file_name", "QuestionText", "answer", "confidence"]
    given = (["yes"] * 3, ["no", "no", "yes"], ["rain"] * 3, ["wind", "storm", "rain"])
    rows = [[f"s{i}.wav", f"Is it {i}?", a, "yes"] for i, some in enumerate(given) for a in some]
    return {"clotho_aqa_test.csv": table([head, *rows]), **sounds("audio_files/s{}.wav")}


def music_avqa() -> Files:
    rows = [
        {
            "video_id": f"000{i // 2}",
            "question_id": i,
            "type": '["Audio", "Counting"]' if i % 2 else '["Visual", "Location"]',
            "question_content": "Is the <Object> in the <LR>?",
            "templ_values": '["ukulele", "left"]',
            "question_deleted": 0,
            "anser": ("yes", "two", "left", "more than ten")[i],
        }
        for i in range(ROWS)
    ]
    return {"avqa-test.json": json.dumps(rows), **talkies("videos/000{}.mp4", 2)}


def valor() -> Files:
    ids = [f"v{i}" for i in range(ROWS)]
    texts = {name: CAPTIONS[i][:1] for i, name in enumerate(ids)}
    return {
        "test_id.json": json.dumps(ids),
        "txt_mapper.json": json.dumps(texts),
        **talkies("videos/v{}.mp4"),
    }


def avsd() -> Files:
    dialogs = [
        {
            "image_id": f"CH{i}",
            "dialog": [
                {"question": "who?", "answer": "a man"},
                {"question": f"what does he do {i}?", "answer": "__UNDISCLOSED__"},
            ],
        }
        for i in range(ROWS)
    ]
    images = [{"id": i + 1} for i in range(ROWS)]
    return {
        "test_set4DSTC7-AVSD.json": json.dumps({"dialogs": dialogs}),
        "test_set4DSTC7-AVSD_multiref.json": coco_form(CAPTIONS, images),
        **talkies("videos/CH{}.mp4"),
    }


def objaverse() -> Files:
    rows = [
        {
            "object_id": f"o{i}",
            "conversations": [
                {"from": "human", "value": "<point>\nWhat is this?"},
                {"from": "gpt", "value": CAPTIONS[i][0]},
            ],
        }
        for i in range(ROWS)
    ]
    clouds = {f"8192_npy/o{i}_8192.npy": make_npy(make_cloud(seed=i)) for i in range(ROWS)}
    return {"PointLLM_brief_description_val_200_GT.json": json.dumps(rows), **clouds}


def make_depth(seed: int) -> bytes:
    """A depth map as SUN RGB-D stores it: millimetres with their bits turned."""
    rows = np.arange(48, dtype=np.uint32)[:, None] * 40 + 1000 + 100 * seed
    raw = np.broadcast_to(rows, (48, 64)).astype(np.uint32)
    out = io.BytesIO()
    Image.fromarray(((raw << 3) | (raw >> 13)).astype(np.uint16)).save(out, "PNG")
    return out.getvalue()


def rooms() -> Files:
    """Rooms of both sets; one has a class that SUN RGB-D does not ask, one trains."""
    listed = {
        "kv1/NYUdata/NYU0001": "bedroom",
        "kv1/NYUdata/NYU0002": "home_office",
        "kv1/NYUdata/NYU0003": "cafe",
        "kv2/kinect2data/000065": "lab",
        "xtion/sun3ddata/x1": "bedroom",
    }
    files: Files = {}
    for i, (room, name) in enumerate(listed.items()):
        top = f"SUNRGBD/{room}"
        files[f"{top}/scene.txt"] = name + "\n"
        files[f"{top}/image/a.jpg"] = make_photo(seed=i)
        files[f"{top}/depth_bfx/a.png"] = make_depth(i)
        files[f"{top}/normal/a.png"] = make_photo(seed=i + 20, kind="PNG")
    cells = np.empty((1, len(listed)), dtype=object)
    for i, room in enumerate(listed):
        cells[0, i] = f"/n/fs/sun3d/data/SUNRGBD/{room}/"
    out = io.BytesIO()
    savemat(out, {"alltest": cells, "alltrain": cells[:, :1]})
    return {**files, "allsplit.mat": out.getvalue()}


def ego4d() -> Files:
    images = [
        {
            "id": f"w{i}",
            "video_uid": f"u{i % 2}",
            "window_start": 1.0 + i,
            "window_end": 3.0 + i,
        }
        for i in range(ROWS)
    ]
    files: Files = {"imu_2000_cococap.json": coco_form(CAPTIONS, images)}
    for uid in ("u0", "u1"):
        times = np.arange(0, 8000, 5, dtype=np.float64)
        wave = np.stack([np.sin(times / (200 + 40 * k)) for k in range(6)])
        files[f"{uid}.npy"] = make_npy(wave)
        files[f"{uid}_timestamps.npy"] = make_npy(times)
    return files


def nsd() -> Files:
    images = [{"id": i, "file_name": f"r{i}.npy"} for i in range(ROWS)]
    generator = np.random.default_rng(0)
    arrays = {
        f"r{i}.npy": make_npy(generator.normal(size=(3, 15724)).astype(np.float32))
        for i in range(ROWS)
    }
    return {"fmri_eval_cococap.json": coco_form(CAPTIONS, images), **arrays}


TREES: dict[str, Callable[[], Files]] = {
    "gqa": gqa,
    "vqav2": lambda: vqa("v2_"),
    "okvqa": lambda: vqa(""),
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "scienceqa": scienceqa,
    "mmbench": mmbench,
    "mmvet": mmvet,
    "seedbench": seedbench,
    "nextqa": nextqa,
    "how2qa": how2qa,
    "mme": mme,
    "msvd-qa": msvd,
    "nocaps": nocaps,
    "flickr30k": flickr30k,
    "vatex": vatex,
    "clotho": clotho,
    "clotho-aqa": clotho_aqa,
    "music-avqa": music_avqa,
    "valor32k": valor,
    "avsd": avsd,
    "objaverse-caption": objaverse,
    "objaverse-class": objaverse,
    "nyuv2-depth": rooms,
    "nyuv2-normal": rooms,
    "sunrgbd-depth": rooms,
    "sunrgbd-normal": rooms,
    "ego4d-imu": ego4d,
    "nsd": nsd,
}
"""Benchmark -> its files."""


def write_benchmark(root: Path, name: str) -> Path:
    """Write a benchmark's files."""
    return write_tree(root, TREES[name]())
