"""Sources llava665k, pointllm, sharegpt, msrvtt, msrvtt-qa and audiocaps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from shard_worlds import picture, write_tree
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

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards.sources.readers.conversations import clean_turns

SHORT = "Answer the question using a single word or phrase."


def test_llavas_mix(tmp_path: Path) -> None:
    rows: list[Any] = [
        {
            "id": "000000033471",
            "image": "coco/train2017/1.jpg",
            "conversations": make_turns("<image>\nWhat colors?", "white and red", "More?", "é"),
        },
        {"id": "wmtW", "conversations": make_turns("How can I <image> it?", "so"), "model": ""},
        {
            "id": "000000033471",
            "image": "ocr_vqa/images/7.gif",
            "conversations": make_turns("Who?\n<image>", "she"),
        },
        {"id": "x", "image": "gqa/images/none.jpg", "conversations": make_turns("Q", "A")},
        "row",
        {"id": "y", "conversations": []},
    ]
    files: dict[str, bytes | str] = {
        "llava_v1_5_mix665k.json": json.dumps(rows, ensure_ascii=False),
        "coco/train2017/1.jpg": make_photo(seed=1),
        "ocr_vqa/images/7.jpg": make_photo(seed=7),
    }
    inputs = write_tree(tmp_path / "in", files)
    report, dataset = build_source("llava665k", inputs, tmp_path / "image", max_failures=0.6)
    assert {
        k: (s["jpg"], s["json"]["id"], s["json"]["conversations"])
        for k, s in read_samples(dataset).items()
    } == {
        "000000": (
            make_photo(seed=1),
            "000000033471",
            make_turns("What colors?", "white and red", "More?", "é"),
        ),
        "000002": (make_photo(seed=7), "000000033471", make_turns("Who?", "she")),
    }
    assert [q.reason for q in report.quarantined] == [
        "missing file: gqa/images/none.jpg",
        "unreadable row: a str, not an object",
    ]
    assert "only the rows with a picture are built; the others: -o rows=text" in report.notes
    report, dataset = build_source(
        "llava665k", inputs, tmp_path / "text", rows="text", max_failures=0.6
    )
    assert dataset.modalities == ()
    assert {k: s["json"]["conversations"] for k, s in read_samples(dataset).items()} == {
        "000001": make_turns("How can I <image> it?", "so")
    }
    assert [q.reason for q in report.quarantined] == [
        "unreadable row: the conversation has no answer"
    ]


@pytest.mark.parametrize(("listed", "stored"), [("jpg", "gif"), ("gif", "webp"), ("jpg", "png")])
def test_a_picture_is_found_under_another_extension(
    tmp_path: Path, listed: str, stored: str
) -> None:
    rows = [
        {"id": "a", "image": f"ocr_vqa/images/{i}.{listed}", "conversations": make_turns("Q", "A")}
        for i in range(2)
    ]
    form = {"gif": "GIF", "webp": "WEBP", "png": "PNG"}[stored]
    inputs = write_tree(
        tmp_path / "in",
        {
            "llava_v1_5_mix665k.json": json.dumps(rows),
            f"ocr_vqa/images/0.{stored}": picture(0, form),
            f"ocr_vqa/images/1.{listed}": picture(1),
            f"ocr_vqa/images/1.{stored}": picture(2, form),
        },
    )
    report, dataset = build_source("llava665k", inputs, tmp_path / "out")
    assert report.failures == 0
    found = read_samples(dataset)
    assert found["000000"][stored] == picture(0, form)
    assert found["000001"][listed] == picture(1), "the name as it is listed goes first"


def test_pointllm(tmp_path: Path) -> None:
    rows = [
        {
            "object_id": "abc",
            "conversation_type": "detailed_description",
            "conversations": make_turns("<point>\nWhat is it?", "a cup"),
        },
        {
            "object_id": "abc",
            "conversation_type": "multi_round",
            "conversations": make_turns("<point>\nWhat?", "cup", "Use?", "tea"),
        },
        {"object_id": "gone", "conversations": make_turns("q", "a")},
        {"conversations": make_turns("q", "a")},
    ]
    files: dict[str, bytes | str] = {
        "PointLLM_complex_instruction_70K.json": to_json(rows),
        "8192_npy/abc_8192.npy": make_npy(make_cloud(seed=4)),
    }
    report, dataset = build_source(
        "pointllm", write_tree(tmp_path / "in", files), tmp_path / "out", max_failures=0.6
    )
    assert {k: s["json"] for k, s in read_samples(dataset).items()} == {
        "abc-000000": {
            "object_id": "abc",
            "conversation_type": "detailed_description",
            "conversations": make_turns("What is it?", "a cup"),
        },
        "abc-000001": {
            "object_id": "abc",
            "conversation_type": "multi_round",
            "conversations": make_turns("What?", "cup", "Use?", "tea"),
        },
    }
    assert decode_sample(dataset, "abc-000001")["point"][:, 3:].numpy() == pytest.approx(
        make_cloud(seed=4)[:, 3:]
    )
    assert list(get_reasons(report).values()) == [
        "missing file: gone_8192.npy",
        "unreadable row: no 'object_id'",
    ]


def test_sharegpt(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"id": "a_0", "conversations": make_turns("Hi", "Hello <image> tag")},
        {
            "id": "b",
            "conversations": [{"from": "gpt", "value": "first"}, *make_turns("Then?", "so")],
        },
        {
            "id": "c",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "A"},
            ],
        },
        {"id": "d", "conversations": [{"from": "tool", "value": "x"}]},
        {"id": "e"},
    ]
    lines = "\n".join(json.dumps(r) for r in rows[:2]) + "\nnot json\n"
    inputs = write_tree(tmp_path / "in", {"a.json": to_json(rows), "b.jsonl": lines})
    report, dataset = build_source("sharegpt", inputs, tmp_path / "out", max_failures=0.5)
    assert dataset.modalities == ()
    system = [{"from": "system", "value": "Be brief."}, *make_turns("Q", "A")]
    assert {k: s["json"]["conversations"] for k, s in read_samples(dataset).items()} == {
        "a-0000000": make_turns("Hi", "Hello <image> tag"),
        "a-0000001": make_turns("Then?", "so"),
        "a-0000002": system,
        "b-0000000": make_turns("Hi", "Hello <image> tag"),
        "b-0000001": make_turns("Then?", "so"),
    }
    assert list(get_reasons(report).values()) == [
        "unreadable row: turn 0 calls a tool or is a tool's answer, which no text format here can "
        "express exactly",
        "unreadable row: no 'conversations'",
        "unreadable row: not JSON",
    ]
    _, one = build_source("sharegpt", inputs / "b.jsonl", tmp_path / "one", max_failures=0.5)
    assert one.samples() == 2
    with pytest.raises(UsageError, match=r"no \.json or \.jsonl"):
        build_source("sharegpt", write_tree(tmp_path / "x", {"y.txt": ""}), tmp_path / "none")


def test_msrvtt(tmp_path: Path) -> None:
    info = {
        "info": {},
        "videos": [
            {
                "category": 9,
                "url": "u",
                "video_id": f"video{n}",
                "start time": 137.72,
                "end time": 149.44,
                "split": "train",
                "id": n,
            }
            for n in range(2)
        ],
        "sentences": [
            {"caption": "a man plays", "video_id": "video1", "sen_id": 5},
            {"caption": "  a ball", "video_id": "video0", "sen_id": 3},
            {"caption": "", "video_id": "video0", "sen_id": 4},
            {"caption": "gone", "video_id": "video9", "sen_id": 6},
            {"caption": "half", "video_id": "video2", "sen_id": 7},
        ],
    }
    questions = [
        {"answer": "ball", "category_id": 14, "id": 11, "question": "what moves?", "video_id": 0},
        {"id": 12, "video_id": 0, "answer": "x"},
    ]
    inputs = write_tree(
        tmp_path / "in",
        {
            "train_val_videodatainfo.json": to_json(info),
            "train_qa.json": to_json(questions),
            "TrainValVideo/video0.mp4": make_film(),
            "TrainValVideo/video1.mp4": make_film(seed=1),
            "TrainValVideo/video2.mp4": make_film()[:700],
        },
    )
    report, dataset = build_source("msrvtt", inputs, tmp_path / "out", max_failures=0.7)
    prompt = "Provide a one-sentence caption for the provided video."
    assert {
        k: (s["mp4"], s["txt"], s["json"]["conversations"])
        for k, s in read_samples(dataset).items()
    } == {
        "video1-5": (make_film(seed=1), "a man plays", make_turns(prompt, "a man plays")),
        "video0-3": (make_film(), "a ball", make_turns(prompt, "a ball")),
    }
    assert decode_sample(dataset, "video0-3")["video"].shape == (15, 3, 224, 224)
    why = list(get_reasons(report).values())
    assert why[:2] == ["unreadable row: caption is '', not a text", "missing file: video9.mp4"]
    assert why[2].startswith("unreadable video: .mp4")
    report, dataset = build_source("msrvtt-qa", inputs, tmp_path / "qa", max_failures=0.5)
    assert {k: s["json"] for k, s in read_samples(dataset).items()} == {
        "11": {"video_id": "video0", "conversations": make_turns(f"what moves? {SHORT}", "ball")}
    }
    assert list(get_reasons(report).values()) == ["unreadable row: no 'question'"]


def test_audiocaps(tmp_path: Path) -> None:
    table = (
        "audiocap_id,youtube_id,start_time,caption\n"
        '91139,r1nicOVtvkQ,130,"A woman talks, then sings"\n58146,-DeAdhYKbGE,30,A bell\n'
        "7,aaaaaaaaaaa,30,by its own id\n8,gone,30,nowhere\n9,r1nicOVtvkQ,130,\n10,x,1\n"
        "11,broken,5,half\n12,Yes,10,in ms\n"
    )
    inputs = write_tree(
        tmp_path / "in",
        {
            "dataset/train.csv": table,
            "clips/r1nicOVtvkQ_130.wav": make_tone("WAV"),
            "clips/Y-DeAdhYKbGE.flac": make_tone(hertz=200),
            "more/7.ogg": make_tone("OGG"),
            "clips/broken_5.flac": make_tone()[:60],
            "clips/Yes_10000_20000.flac": make_tone(hertz=300),
        },
    )
    report, dataset = build_source("audiocaps", inputs, tmp_path / "out", max_failures=0.6)
    found = read_samples(dataset)
    assert {k: (s["txt"], *sorted(s.keys() - {"txt", "json"})) for k, s in found.items()} == {
        "91139": ("A woman talks, then sings", "wav"),
        "58146": ("A bell", "flac"),
        "7": ("by its own id", "ogg"),
        "12": ("in ms", "flac"),
    }
    assert found["58146"]["json"] == {
        "youtube_id": "-DeAdhYKbGE",
        "start_time": "30",
        "conversations": make_turns(
            "Provide a one-sentence caption for the provided audio.", "A bell"
        ),
    }
    assert decode_sample(dataset, "91139")["audio"].std() > 0.01
    why = get_reasons(report)
    assert (why["8"], why["9"], why["row-0000007"]) == (
        "missing file: no clip of gone at 30 s",
        "empty caption",
        "unreadable row: 3 columns where the header has 4",
    )
    assert why["11"].startswith("unreadable audio: .flac (60 bytes)")
    skipped, _ = build_source(
        "audiocaps", inputs, tmp_path / "skip", max_failures=0.6, missing="skip"
    )
    assert "8" not in get_reasons(skipped)
    with pytest.raises(OneLLMError, match="bad samples: "):
        build_source("audiocaps", inputs, tmp_path / "none")
    with pytest.raises(UsageError, match=r"no test.csv or dataset/test\.csv"):
        build_source("audiocaps", inputs, tmp_path / "none", splits="test")


def test_answers_that_are_not_trained_on_stay_so() -> None:
    """Turns of a table have the same keys, and weights that are null."""
    said: list[dict[str, Any]] = [
        {**turn, "weight": None} for turn in make_turns("Q", "bad", "Q", "good")
    ]
    said[1]["weight"] = 0
    turns = clean_turns(said)
    assert [turn.get("weight") for turn in turns] == [None, 0, None, None]
    assert [turn["value"] for turn in turns] == ["Q", "bad", "Q", "good"]


def test_turns_are_cleaned() -> None:
    assert clean_turns(make_turns("<image>\nWhat?", "It is <image>.")) == make_turns(
        "What?", "It is <image>."
    )
    assert clean_turns(
        [*make_turns("Q", "A"), {"from": "human", "value": "unanswered"}]
    ) == make_turns("Q", "A")
    with pytest.raises(ValueError, match="turn 1 is a system turn"):
        clean_turns([{"from": "human", "value": "Q"}, {"from": "system", "value": "x"}])
