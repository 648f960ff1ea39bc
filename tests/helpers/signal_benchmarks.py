"""Rows of the benchmarks of films, sounds, clouds, depth maps, IMU and fMRI, as published."""

from __future__ import annotations

import io
import json

import numpy as np
from benchmark_files import (
    CAPTIONS,
    ROWS,
    Files,
    coco_form,
    films,
    make_depth,
    sounds,
    table,
    talkies,
)
from scipy.io import savemat
from source_checks import make_cloud, make_npy, make_photo


def vatex() -> Files:
    rows = [{"videoID": f"v{i}_000000_000010", "enCap": CAPTIONS[i]} for i in range(ROWS)]
    return {
        "vatex_public_test_english_v1.1.json": json.dumps(rows),
        **films("videos/v{}_000000_000010.mp4"),
    }


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
    dialogues = [
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
        "test_set4DSTC7-AVSD.json": json.dumps({"dialogs": dialogues}),
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
