"""Sources of conversations: onellm-instruct, llava665k, pointllm, sharegpt, msrvtt, msrvtt-qa, audiocaps."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shard_worlds import contents, write_tree
from source_checks import (
    as_json,
    built,
    cloud,
    decoded,
    film,
    npy,
    photo,
    reasons,
    samples,
    tone,
    turns,
)

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.data.text_parts import read_turns
from onellm_dist.modalities import Part
from onellm_dist.shards.sources.readers.conversations import clean_turns

SHORT = "Answer the question using a single word or phrase."


def row(number: int, image: str | None, *values: str, **more: Any) -> dict[str, Any]:
    medium = {} if image is None else {"image": image}
    return {"id": f"{number:06d}", **medium, "conversations": turns(*values), **more}


def tensor(values: np.ndarray) -> bytes:
    """A `.pt` file."""
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(values.copy()), buffer)
    return buffer.getvalue()


def instruction_tuning(root: Path) -> Path:
    """The tree of csuhan/OneLLM_InstructionTuning, paths as in its rows."""
    base = "InstructionTuning"
    motion = np.stack([np.sin((i + 1) * np.arange(2400) / 200) for i in range(6)])
    files: dict[str, bytes | str] = {
        f"{base}/audio/audiocap_train.json": as_json(
            [row(0, f"{base}/audio/audiocap/train/a.wav", "Caption <audio>", "a bell")]
        ),
        f"{base}/audio/audiocap/train/a.wav": tone("WAV"),
        f"{base}/audio/audio_conversation.json": as_json(
            [
                row(
                    0,
                    "datasets/InstructionTuning/audio/b.flac",
                    "<audio>\nWhat?",
                    "hum",
                    "So?",
                    "yes",
                )
            ]
        ),
        f"{base}/audio/b.flac": tone(),
        f"{base}/depth_normal/llava_instruct_50k_depth.json": as_json(
            [
                row(
                    0,
                    f"{base}/depth_normal/rgb/1.jpg",
                    "Describe <image>",
                    "near",
                    depth_image=f"{base}/depth_normal/depth/1.png",
                )
            ]
        ),
        f"{base}/depth_normal/llava_instruct_50k_normal.json": as_json(
            [
                row(
                    0,
                    f"{base}/depth_normal/rgb/1.jpg",
                    "Describe",
                    "flat",
                    normal_image=f"{base}/depth_normal/normal/1.jpg",
                )
            ]
        ),
        f"{base}/depth_normal/rgb/1.jpg": photo(),
        f"{base}/depth_normal/depth/1.png": photo(seed=1, kind="PNG"),
        f"{base}/depth_normal/normal/1.jpg": photo(seed=2),
        f"{base}/fmri/fmri_fixed_train.json": as_json(
            [row(0, f"{base}/fmri/1.npy", "Describe the scene based on fMRI data.", "a cat")]
        ),
        f"{base}/fmri/1.npy": npy(np.arange(3 * 15724).reshape(3, 15724).astype(np.float32)),
        f"{base}/image/cococap_train.json": as_json(
            [row(0, f"{base}/image/coco/train2017/1.jpg", "<image>\nCaption", "a dog")]
        ),
        f"{base}/image/llava_v1_5_mix665k_image.json": as_json(
            [row(0, f"{base}/image/coco/train2017/1.jpg", "Q\n<image>", "A", "Q2", "A2")]
        ),
        f"{base}/image/coco/train2017/1.jpg": photo(seed=3),
        f"{base}/image/llava_v1_5_mix665k_text.json": as_json(
            [row(0, None, "write <video> in HTML", "<video></video>")]
        ),
        f"{base}/imu/imu_fixed_50k.json": as_json(
            [
                row(
                    0,
                    None,
                    "Describe the motion.",
                    "walks",
                    imu_path=f"{base}/imu/processed",
                    video_uid="v",
                    window_start=3.0,
                    window_end=5.0,
                )
            ]
        ),
        f"{base}/imu/processed/v.npy": npy(motion),
        f"{base}/imu/processed/v_timestamps.npy": npy(np.arange(2400) * 5.0),
        f"{base}/point/pointllm_70k.json": as_json(
            [
                row(0, f"{base}/point/8192_npy/aa_8192.npy", "<point>\nWhat?", "a cup"),
                row(1, f"{base}/point/pt/bb.pt", "What?", "a pot"),
                row(2, f"{base}/point/pt/cc.pt", "What?", "a fork"),
            ]
        ),
        f"{base}/point/8192_npy/aa_8192.npy": npy(cloud(seed=1)),
        f"{base}/point/pt/bb.pt": tensor(cloud(seed=2).T),
        f"{base}/point/8192_npy/cc_8192.npy": npy(cloud(seed=3)),
        f"{base}/video/msrvtt_cap_trainval.json": as_json(
            [row(0, f"{base}/video/msrvtt/video0.mp4", "Caption", "a ball moves")]
        ),
        f"{base}/video/msrvtt_vqa_train.json": as_json(
            [row(0, f"{base}/video/msrvtt/video0", "what moves?", "ball")]
        ),
        f"{base}/video/msrvtt_vqa_test.json": as_json(
            [row(0, f"{base}/video/msrvtt/video0.mp4", "TEST", "TEST")]
        ),
        f"{base}/video/msrvtt/video0.mp4": film(),
    }
    return write_tree(root, files)


def test_onellms_own_files(tmp_path: Path) -> None:
    """Each modality is a dataset; the folder itself and the one above it are both good inputs."""
    inputs = instruction_tuning(tmp_path / "datasets")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    values: dict[str, torch.Tensor] = {}
    for i, modality in enumerate(
        ("image", "text", "video", "audio", "point", "depth", "normal", "imu", "fmri")
    ):
        place = inputs if i % 2 else inputs / "InstructionTuning"
        report, dataset = built("onellm-instruct", place, tmp_path / modality, modality=modality)
        assert not report.quarantined
        assert dataset.modalities == (() if modality == "text" else (modality,))
        found[modality] = samples(dataset)
        values |= {
            f"{modality}/{k}": decoded(dataset, k)[modality]
            for k in found[modality]
            if modality != "text"
        }
        for parts in contents(dataset).values():
            assert read_turns({e: Part(e, d) for e, d in parts.items()})  # as training reads it
    chats = {m: {k: s["json"]["conversations"] for k, s in d.items()} for m, d in found.items()}
    assert chats["image"] == {
        "cococap_train-0000000": turns("Caption", "a dog"),
        "llava_v1_5_mix665k_image-0000000": turns("Q", "A", "Q2", "A2"),
    }
    assert chats["text"] == {
        "llava_v1_5_mix665k_text-0000000": turns("write <video> in HTML", "<video></video>")
    }
    assert chats["audio"] == {
        "audiocap_train-0000000": turns("Caption", "a bell"),
        "audio_conversation-0000000": turns("What?", "hum", "So?", "yes"),
    }
    assert set(found["audio"]["audio_conversation-0000000"]) == {"flac", "json"}
    assert found["audio"]["audio_conversation-0000000"]["flac"] == tone()
    assert chats["video"] == {
        "msrvtt_cap_trainval-0000000": turns("Caption", "a ball moves"),
        "msrvtt_vqa_train-0000000": turns("what moves?", "ball"),
    }
    assert found["video"]["msrvtt_vqa_train-0000000"]["mp4"] == film()
    assert set(found["depth"]["llava_instruct_50k_depth-0000000"]) == {"jpg", "depth.png", "json"}
    assert found["normal"]["llava_instruct_50k_normal-0000000"]["normal.jpg"] == photo(seed=2)
    # Clouds: .npy [N, 6]; a 6 x N tensor becomes one; a .pt that is not there is found as 8192_npy.
    for number, seed in enumerate((1, 2, 3)):
        stored = np.load(io.BytesIO(found["point"][f"pointllm_70k-000000{number}"]["npy"]))
        assert np.array_equal(stored, cloud(seed=seed))
    expected = np.stack([np.sin((i + 1) * np.arange(600, 1000) / 200) for i in range(6)]).astype(
        np.float32
    )
    assert np.array_equal(values["imu/imu_fixed_50k-0000000"].numpy(), expected)
    assert values["fmri/fmri_fixed_train-0000000"][0, :3].tolist() == [15724.0, 15725.0, 15726.0]
    assert found["imu"]["imu_fixed_50k-0000000"]["json"]["video_uid"] == "v"


def test_msrvtts_test_split_is_left_out_and_said(tmp_path: Path) -> None:
    inputs = instruction_tuning(tmp_path / "in")
    report, dataset = built("onellm-instruct", inputs, tmp_path / "out", modality="video")
    assert not any("test" in k for k in samples(dataset))
    assert any(n.startswith("WARNING: video/msrvtt_vqa_test.json left out") for n in report.notes)
    assert any(
        n.startswith("missing: video/msrvtt_cap_test.json, video/msrvtt_vqa_val.json")
        for n in report.notes
    )
    report, dataset = built(
        "onellm-instruct", inputs, tmp_path / "all", modality="video", include_test="true"
    )
    assert samples(dataset)["msrvtt_vqa_test-0000000"]["json"]["conversations"] == turns(
        "TEST", "TEST"
    )
    assert any("TEST split, and are in this training set" in n for n in report.notes)
    _, dataset = built(
        "onellm-instruct", inputs, tmp_path / "one", modality="video", files="msrvtt_vqa_train.json"
    )
    assert list(samples(dataset)) == ["msrvtt_vqa_train-0000000"]
    for options, message in (
        ({}, "modality=None is none of image, text"),
        ({"modality": "video", "files": "x"}, "no file called x"),
    ):
        with (
            pytest.raises(UsageError, match=message)
            if options
            else pytest.raises(UsageError, match="modality=None is not one of audio")
        ):
            built("onellm-instruct", inputs, tmp_path / "none", **options)


def test_bad_instruction_rows(tmp_path: Path) -> None:
    inputs = instruction_tuning(tmp_path / "in")
    base = inputs / "InstructionTuning"
    rows: list[Any] = [
        row(0, "InstructionTuning/point/8192_npy/aa_8192.npy", "q", "a"),
        row(1, "point/none.npy", "q", "a"),
        row(2, "../../etc/passwd", "q", "a"),
        row(3, "point/8192_npy/dd_8192.npy", "q", "a"),
        row(4, "point/ee.pt", "q", "a"),
        row(5, "point/ff.pt", "q", "a"),
        row(6, "InstructionTuning/point/8192_npy/aa_8192.npy", "q", " "),
        row(7, None, "q", "a"),
        "row",
        {"image": "x", "conversations": 3},
        row(10, "InstructionTuning/point/8192_npy/aa_8192.npy", "only asked"),
    ]
    write_tree(
        base,
        {
            "point/pointllm_70k.json": as_json(rows),
            "point/8192_npy/dd_8192.npy": npy(np.zeros((8192, 3), np.float32)),
            "point/ee.pt": tensor(cloud().T)[:1000],
            "point/ff.pt": tensor(np.zeros((6, 8192), np.int64)),
        },
    )
    report, dataset = built(
        "onellm-instruct", inputs, tmp_path / "out", modality="point", max_failures=0.95
    )
    assert list(samples(dataset)) == ["pointllm_70k-0000000"]
    starts = [
        "missing file: point/none.npy",
        "unreadable row: the file name ../../etc/passwd leads out",
        "unreadable point: .npy is an array of shape (8192, 3)",
        "unreadable .pt: ee.pt",
        "wrong type: ff.pt holds torch.int64",
        "unreadable row: turn 1 is an empty answer",
        "unreadable row: no 'image'",
        "unreadable row: a str, not an object",
        "unreadable row: expected a list of turns, not int",
        "unreadable row: the conversation has no answer",
    ]
    why = [q.reason for q in report.quarantined]
    assert [(w, s) for w, s in zip(why, starts, strict=True) if not w.startswith(s)] == []
    with pytest.raises(OneLLMError, match="are bad"):
        built("onellm-instruct", inputs, tmp_path / "none", modality="point")
    (base / "imu/processed/v_timestamps.npy").unlink()
    with pytest.raises(OneLLMError, match="no recording of video v"):
        built("onellm-instruct", inputs, tmp_path / "imu", modality="imu")


def test_llavas_mix(tmp_path: Path) -> None:
    rows: list[Any] = [
        {
            "id": "000000033471",
            "image": "coco/train2017/1.jpg",
            "conversations": turns("<image>\nWhat colors?", "white and red", "More?", "é"),
        },
        {"id": "wmtW", "conversations": turns("How can I <image> it?", "so"), "model": ""},
        {
            "id": "000000033471",
            "image": "ocr_vqa/images/7.gif",
            "conversations": turns("Who?\n<image>", "she"),
        },
        {"id": "x", "image": "gqa/images/none.jpg", "conversations": turns("Q", "A")},
        "row",
        {"id": "y", "conversations": []},
    ]
    files = {
        "llava_v1_5_mix665k.json": json.dumps(rows, ensure_ascii=False),
        "coco/train2017/1.jpg": photo(seed=1),
        "ocr_vqa/images/7.jpg": photo(seed=7),
    }
    inputs = write_tree(tmp_path / "in", files)
    report, dataset = built("llava665k", inputs, tmp_path / "image", max_failures=0.6)
    assert {
        k: (s["jpg"], s["json"]["id"], s["json"]["conversations"])
        for k, s in samples(dataset).items()
    } == {
        "000000": (
            photo(seed=1),
            "000000033471",
            turns("What colors?", "white and red", "More?", "é"),
        ),
        "000002": (photo(seed=7), "000000033471", turns("Who?", "she")),
    }
    assert [q.reason for q in report.quarantined] == [
        "missing file: gqa/images/none.jpg",
        "unreadable row: a str, not an object",
    ]
    assert "only the rows with a picture are built; the others: -o rows=text" in report.notes
    report, dataset = built("llava665k", inputs, tmp_path / "text", rows="text", max_failures=0.6)
    assert dataset.modalities == ()
    assert {k: s["json"]["conversations"] for k, s in samples(dataset).items()} == {
        "000001": turns("How can I <image> it?", "so")
    }
    assert [q.reason for q in report.quarantined] == [
        "unreadable row: the conversation has no answer"
    ]


def test_pointllm(tmp_path: Path) -> None:
    rows = [
        {
            "object_id": "abc",
            "conversation_type": "detailed_description",
            "conversations": turns("<point>\nWhat is it?", "a cup"),
        },
        {
            "object_id": "abc",
            "conversation_type": "multi_round",
            "conversations": turns("<point>\nWhat?", "cup", "Use?", "tea"),
        },
        {"object_id": "gone", "conversations": turns("q", "a")},
        {"conversations": turns("q", "a")},
    ]
    files = {
        "PointLLM_complex_instruction_70K.json": as_json(rows),
        "8192_npy/abc_8192.npy": npy(cloud(seed=4)),
    }
    report, dataset = built(
        "pointllm", write_tree(tmp_path / "in", files), tmp_path / "out", max_failures=0.6
    )
    assert {k: s["json"] for k, s in samples(dataset).items()} == {
        "abc-000000": {
            "object_id": "abc",
            "conversation_type": "detailed_description",
            "conversations": turns("What is it?", "a cup"),
        },
        "abc-000001": {
            "object_id": "abc",
            "conversation_type": "multi_round",
            "conversations": turns("What?", "cup", "Use?", "tea"),
        },
    }
    assert decoded(dataset, "abc-000001")["point"][:, 3:].numpy() == pytest.approx(
        cloud(seed=4)[:, 3:]
    )
    assert list(reasons(report).values()) == [
        "missing file: gone_8192.npy",
        "unreadable row: no 'object_id'",
    ]


def test_sharegpt(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"id": "a_0", "conversations": turns("Hi", "Hello <image> tag")},
        {"id": "b", "conversations": [{"from": "gpt", "value": "first"}, *turns("Then?", "so")]},
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
    inputs = write_tree(tmp_path / "in", {"a.json": as_json(rows), "b.jsonl": lines})
    report, dataset = built("sharegpt", inputs, tmp_path / "out", max_failures=0.5)
    assert dataset.modalities == ()
    system = [{"from": "system", "value": "Be brief."}, *turns("Q", "A")]
    assert {k: s["json"]["conversations"] for k, s in samples(dataset).items()} == {
        "a-0000000": turns("Hi", "Hello <image> tag"),
        "a-0000001": turns("Then?", "so"),
        "a-0000002": system,
        "b-0000000": turns("Hi", "Hello <image> tag"),
        "b-0000001": turns("Then?", "so"),
    }
    assert list(reasons(report).values()) == [
        "unreadable row: turn 0 is not "
        '{"from": speaker, "value": text} with the speaker '
        '"human" or "gpt" (in the first turn also "system")',
        "unreadable row: no 'conversations'",
        "unreadable row: not JSON",
    ]
    _, one = built("sharegpt", inputs / "b.jsonl", tmp_path / "one", max_failures=0.5)
    assert one.samples() == 2
    with pytest.raises(UsageError, match=r"no \.json or \.jsonl"):
        built("sharegpt", write_tree(tmp_path / "x", {"y.txt": ""}), tmp_path / "none")


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
            "train_val_videodatainfo.json": as_json(info),
            "train_qa.json": as_json(questions),
            "TrainValVideo/video0.mp4": film(),
            "TrainValVideo/video1.mp4": film(seed=1),
            "TrainValVideo/video2.mp4": film()[:700],
        },
    )
    report, dataset = built("msrvtt", inputs, tmp_path / "out", max_failures=0.7)
    prompt = "Provide a one-sentence caption for the provided video."
    assert {
        k: (s["mp4"], s["txt"], s["json"]["conversations"]) for k, s in samples(dataset).items()
    } == {
        "video1-5": (film(seed=1), "a man plays", turns(prompt, "a man plays")),
        "video0-3": (film(), "a ball", turns(prompt, "a ball")),
    }
    assert decoded(dataset, "video0-3")["video"].shape == (15, 3, 224, 224)
    why = list(reasons(report).values())
    assert why[:2] == ["unreadable row: caption is '', not a text", "missing file: video9.mp4"]
    assert why[2].startswith("unreadable video: .mp4 has no video stream")
    report, dataset = built("msrvtt-qa", inputs, tmp_path / "qa", max_failures=0.5)
    assert {k: s["json"] for k, s in samples(dataset).items()} == {
        "11": {"video_id": "video0", "conversations": turns(f"what moves? {SHORT}", "ball")}
    }
    assert list(reasons(report).values()) == ["unreadable row: no 'question'"]


def test_audiocaps(tmp_path: Path) -> None:
    table = (
        'audiocap_id,youtube_id,start_time,caption\n91139,r1nicOVtvkQ,130,"A woman talks, then sings"\n58146,-DeAdhYKbGE,30,A bell\n'
        "7,aaaaaaaaaaa,30,by its own id\n8,gone,30,nowhere\n9,r1nicOVtvkQ,130,\n10,x,1\n11,broken,5,half\n12,Yes,10,in ms\n"
    )
    inputs = write_tree(
        tmp_path / "in",
        {
            "dataset/train.csv": table,
            "clips/r1nicOVtvkQ_130.wav": tone("WAV"),
            "clips/Y-DeAdhYKbGE.flac": tone(hertz=200),
            "more/7.ogg": tone("OGG"),
            "clips/broken_5.flac": tone()[:60],
            "clips/Yes_10000_20000.flac": tone(hertz=300),
        },
    )
    report, dataset = built("audiocaps", inputs, tmp_path / "out", max_failures=0.6)
    found = samples(dataset)
    assert {k: (s["txt"], *sorted(s.keys() - {"txt", "json"})) for k, s in found.items()} == {
        "91139": ("A woman talks, then sings", "wav"),
        "58146": ("A bell", "flac"),
        "7": ("by its own id", "ogg"),
        "12": ("in ms", "flac"),
    }
    assert found["58146"]["json"] == {
        "youtube_id": "-DeAdhYKbGE",
        "start_time": "30",
        "conversations": turns("Provide a one-sentence caption for the provided audio.", "A bell"),
    }
    assert decoded(dataset, "91139")["audio"].std() > 0.01
    why = reasons(report)
    assert (why["8"], why["9"], why["row-0000007"]) == (
        "missing file: no clip of gone at 30 s",
        "empty caption",
        "unreadable row: 3 columns where the header has 4",
    )
    assert why["11"].startswith("unreadable audio: .flac (60 bytes)")
    skipped, _ = built("audiocaps", inputs, tmp_path / "skip", max_failures=0.6, missing="skip")
    assert "8" not in reasons(skipped)
    with pytest.raises(OneLLMError, match="are bad"):
        built("audiocaps", inputs, tmp_path / "none")
    with pytest.raises(UsageError, match=r"no test.csv or dataset/test\.csv"):
        built("audiocaps", inputs, tmp_path / "none", splits="test")


def test_turns_are_cleaned() -> None:
    assert clean_turns(turns("<image>\nWhat?", "It is <image>.")) == turns(
        "What?", "It is <image>."
    )
    assert clean_turns([*turns("Q", "A"), {"from": "human", "value": "unanswered"}]) == turns(
        "Q", "A"
    )
    with pytest.raises(ValueError, match="turn 1 is a system turn"):
        clean_turns([{"from": "human", "value": "Q"}, {"from": "system", "value": "x"}])
