"""The folders of OneLLM's own instruction data, with one or more rows of every file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shard_worlds import write_tree
from source_checks import (
    make_cloud,
    make_film,
    make_npy,
    make_photo,
    make_tone,
    make_turns,
    to_json,
)


def row(number: int, image: str | None, *values: str, **more: Any) -> dict[str, Any]:
    medium = {} if image is None else {"image": image}
    return {"id": f"{number:06d}", **medium, "conversations": make_turns(*values), **more}


def tensor(values: np.ndarray) -> bytes:
    """A `.pt` file."""
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(values.copy()), buffer)
    return buffer.getvalue()


BASE = "InstructionTuning"


def make_audio_and_depth_files() -> dict[str, bytes | str]:
    """Sounds, and pictures with depth or normals."""
    return {
        f"{BASE}/audio/audiocap_train.json": to_json(
            [row(0, f"{BASE}/audio/audiocap/train/a.wav", "Caption <audio>", "a bell")]
        ),
        f"{BASE}/audio/audiocap/train/a.wav": make_tone("WAV"),
        f"{BASE}/audio/audio_conversation.json": to_json(
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
        f"{BASE}/audio/b.flac": make_tone(),
        f"{BASE}/depth_normal/llava_instruct_50k_depth.json": to_json(
            [
                row(
                    0,
                    f"{BASE}/depth_normal/rgb/1.jpg",
                    "Describe <image>",
                    "near",
                    depth_image=f"{BASE}/depth_normal/depth/1.png",
                )
            ]
        ),
        f"{BASE}/depth_normal/llava_instruct_50k_normal.json": to_json(
            [
                row(
                    0,
                    f"{BASE}/depth_normal/rgb/1.jpg",
                    "Describe",
                    "flat",
                    normal_image=f"{BASE}/depth_normal/normal/1.jpg",
                )
            ]
        ),
        f"{BASE}/depth_normal/rgb/1.jpg": make_photo(),
        f"{BASE}/depth_normal/depth/1.png": make_photo(seed=1, kind="PNG"),
        f"{BASE}/depth_normal/normal/1.jpg": make_photo(seed=2),
    }


def make_fmri_and_image_files() -> dict[str, bytes | str]:
    """Responses, pictures and a text."""
    return {
        f"{BASE}/fmri/fmri_fixed_train.json": to_json(
            [row(0, f"{BASE}/fmri/1.npy", "Describe the scene based on fMRI data.", "a cat")]
        ),
        f"{BASE}/fmri/1.npy": make_npy(
            (np.arange(3 * 15724) / 128).reshape(3, 15724).astype(np.float32)
        ),
        f"{BASE}/image/cococap_train.json": to_json(
            [row(0, f"{BASE}/image/coco/train2017/1.jpg", "<image>\nCaption", "a dog")]
        ),
        f"{BASE}/image/llava_v1_5_mix665k_image.json": to_json(
            [row(0, f"{BASE}/image/coco/train2017/1.jpg", "Q\n<image>", "A", "Q2", "A2")]
        ),
        f"{BASE}/image/coco/train2017/1.jpg": make_photo(seed=3),
        f"{BASE}/image/llava_v1_5_mix665k_text.json": to_json(
            [row(0, None, "write <video> in HTML", "<video></video>")]
        ),
    }


def make_motion_point_and_video_files() -> dict[str, bytes | str]:
    """Recordings, clouds and films."""
    motion = np.stack([np.sin((i + 1) * np.arange(2400) / 200) for i in range(6)])
    return {
        f"{BASE}/imu/imu_fixed_50k.json": to_json(
            [
                row(
                    0,
                    None,
                    "Describe the motion.",
                    "walks",
                    imu_path=f"{BASE}/imu/processed",
                    video_uid="v",
                    window_start=3.0,
                    window_end=5.0,
                )
            ]
        ),
        f"{BASE}/imu/processed/v.npy": make_npy(motion),
        f"{BASE}/imu/processed/v_timestamps.npy": make_npy(np.arange(2400) * 5.0),
        f"{BASE}/point/pointllm_70k.json": to_json(
            [
                row(0, f"{BASE}/point/8192_npy/aa_8192.npy", "<point>\nWhat?", "a cup"),
                row(1, f"{BASE}/point/pt/bb.pt", "What?", "a pot"),
                row(2, f"{BASE}/point/pt/cc.pt", "What?", "a fork"),
            ]
        ),
        f"{BASE}/point/8192_npy/aa_8192.npy": make_npy(make_cloud(seed=1)),
        f"{BASE}/point/pt/bb.pt": tensor(make_cloud(seed=2).T),
        f"{BASE}/point/8192_npy/cc_8192.npy": make_npy(make_cloud(seed=3)),
        f"{BASE}/video/msrvtt_cap_trainval.json": to_json(
            [row(0, f"{BASE}/video/msrvtt/video0.mp4", "Caption", "a ball moves")]
        ),
        f"{BASE}/video/msrvtt_vqa_train.json": to_json(
            [row(0, f"{BASE}/video/msrvtt/video0", "what moves?", "ball")]
        ),
        f"{BASE}/video/msrvtt_vqa_test.json": to_json(
            [row(0, f"{BASE}/video/msrvtt/video0.mp4", "TEST", "TEST")]
        ),
        f"{BASE}/video/msrvtt/video0.mp4": make_film(),
    }


def instruction_tuning(root: Path) -> Path:
    """The tree of csuhan/OneLLM_InstructionTuning, paths as in its rows."""
    files = make_audio_and_depth_files() | make_fmri_and_image_files()
    return write_tree(root, files | make_motion_point_and_video_files())
