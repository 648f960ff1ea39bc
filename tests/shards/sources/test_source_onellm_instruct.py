"""Source onellm-instruct: every modality of OneLLM's own instruction data."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from instruct_trees import instruction_tuning, row, tensor
from shard_worlds import contents, write_tree
from source_checks import (
    build_source,
    decode_sample,
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
from onellm_dist.data.text_parts import read_turns
from onellm_dist.modalities import Part

SHORT = "Answer the question using a single word or phrase."


@pytest.mark.seconds
def test_onellms_own_files(tmp_path: Path) -> None:
    """Each modality is a dataset; the folder itself and the one above it are both good inputs."""
    inputs = instruction_tuning(tmp_path / "datasets")
    found: dict[str, dict[str, dict[str, Any]]] = {}
    values: dict[str, torch.Tensor] = {}
    for i, modality in enumerate(
        ("image", "text", "video", "audio", "point", "depth", "normal", "imu", "fmri")
    ):
        place = inputs if i % 2 else inputs / "InstructionTuning"
        report, dataset = build_source(
            "onellm-instruct", place, tmp_path / modality, modality=modality
        )
        assert not report.quarantined
        assert dataset.modalities == (() if modality == "text" else (modality,))
        found[modality] = read_samples(dataset)
        values |= {
            f"{modality}/{k}": decode_sample(dataset, k)[modality]
            for k in found[modality]
            if modality != "text"
        }
        for parts in contents(dataset).values():
            assert read_turns({e: Part(e, d) for e, d in parts.items()})  # as training reads it
    chats = {m: {k: s["json"]["conversations"] for k, s in d.items()} for m, d in found.items()}
    assert chats["image"] == {
        "cococap_train-0000000": make_turns("Caption", "a dog"),
        "llava_v1_5_mix665k_image-0000000": make_turns("Q", "A", "Q2", "A2"),
    }
    assert chats["text"] == {
        "llava_v1_5_mix665k_text-0000000": make_turns("write <video> in HTML", "<video></video>")
    }
    assert chats["audio"] == {
        "audiocap_train-0000000": make_turns("Caption", "a bell"),
        "audio_conversation-0000000": make_turns("What?", "hum", "So?", "yes"),
    }
    assert set(found["audio"]["audio_conversation-0000000"]) == {"flac", "json"}
    assert found["audio"]["audio_conversation-0000000"]["flac"] == make_tone()
    assert chats["video"] == {
        "msrvtt_cap_trainval-0000000": make_turns("Caption", "a ball moves"),
        "msrvtt_vqa_train-0000000": make_turns("what moves?", "ball"),
    }
    assert found["video"]["msrvtt_vqa_train-0000000"]["mp4"] == make_film()
    assert set(found["depth"]["llava_instruct_50k_depth-0000000"]) == {"jpg", "depth.png", "json"}
    assert found["normal"]["llava_instruct_50k_normal-0000000"]["normal.jpg"] == make_photo(seed=2)
    # Clouds: .npy [N, 6]; a 6 x N tensor becomes one; a .pt that is not there is found as 8192_npy.
    for number, seed in enumerate((1, 2, 3)):
        stored = np.load(io.BytesIO(found["point"][f"pointllm_70k-000000{number}"]["npy"]))
        assert np.array_equal(stored, make_cloud(seed=seed))
    expected = np.stack([np.sin((i + 1) * np.arange(600, 1000) / 200) for i in range(6)]).astype(
        np.float32
    )
    assert np.array_equal(values["imu/imu_fixed_50k-0000000"].numpy(), expected)
    assert values["fmri/fmri_fixed_train-0000000"][0, :3].tolist() == [
        n / 128 for n in range(15724, 15727)
    ]
    assert found["imu"]["imu_fixed_50k-0000000"]["json"]["video_uid"] == "v"


def test_msrvtts_test_split_is_left_out_and_said(tmp_path: Path) -> None:
    inputs = instruction_tuning(tmp_path / "in")
    report, dataset = build_source("onellm-instruct", inputs, tmp_path / "out", modality="video")
    assert not any("test" in k for k in read_samples(dataset))
    assert any(n.startswith("WARNING: video/msrvtt_vqa_test.json left out") for n in report.notes)
    assert any(
        n.startswith("missing: video/msrvtt_cap_test.json, video/msrvtt_vqa_val.json")
        for n in report.notes
    )
    report, dataset = build_source(
        "onellm-instruct", inputs, tmp_path / "all", modality="video", include_test="true"
    )
    assert read_samples(dataset)["msrvtt_vqa_test-0000000"]["json"]["conversations"] == make_turns(
        "TEST", "TEST"
    )
    assert any("TEST split, and are in this training set" in n for n in report.notes)
    _, dataset = build_source(
        "onellm-instruct", inputs, tmp_path / "one", modality="video", files="msrvtt_vqa_train.json"
    )
    assert list(read_samples(dataset)) == ["msrvtt_vqa_train-0000000"]
    for options, message in (
        ({}, "modality=None is none of image, text"),
        ({"modality": "video", "files": "x"}, "no file called x"),
    ):
        with (
            pytest.raises(UsageError, match=message)
            if options
            else pytest.raises(UsageError, match="modality=None is not one of audio")
        ):
            build_source("onellm-instruct", inputs, tmp_path / "none", **options)


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
            "point/pointllm_70k.json": to_json(rows),
            "point/8192_npy/dd_8192.npy": make_npy(np.zeros((8192, 3), np.float32)),
            "point/ee.pt": tensor(make_cloud().T)[:1000],
            "point/ff.pt": tensor(np.zeros((6, 8192), np.int64)),
        },
    )
    report, dataset = build_source(
        "onellm-instruct", inputs, tmp_path / "out", modality="point", max_failures=0.95
    )
    assert list(read_samples(dataset)) == ["pointllm_70k-0000000"]
    starts = [
        "missing file: point/none.npy",
        "unreadable row: the file name ../../etc/passwd leads out",
        "unreadable point: .npy (98432 bytes) is not a readable point cloud: it is an array of",
        "unreadable .pt: ee.pt",
        "wrong type: ff.pt holds int64",
        "unreadable row: turn 1 is an empty answer",
        "unreadable row: no 'image'",
        "unreadable row: a str, not an object",
        "unreadable row: expected a list of turns, not int",
        "unreadable row: the conversation has no answer",
    ]
    why = [q.reason for q in report.quarantined]
    assert [(w, s) for w, s in zip(why, starts, strict=True) if not w.startswith(s)] == []
    with pytest.raises(OneLLMError, match="bad samples: "):
        build_source("onellm-instruct", inputs, tmp_path / "none", modality="point")
    (base / "imu/processed/v_timestamps.npy").unlink()
    with pytest.raises(OneLLMError, match="no recording of video v"):
        build_source("onellm-instruct", inputs, tmp_path / "imu", modality="imu")
