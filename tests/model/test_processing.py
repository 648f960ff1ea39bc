"""The processor: prompts and media files to what generate takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.model import OneLLMProcessor
from onellm_dist.model.presets import load_toy_tokenizer


@pytest.fixture(scope="module")
def processor() -> OneLLMProcessor:
    return OneLLMProcessor(load_toy_tokenizer())


def test_prompts_begin_with_bos_and_are_padded_on_the_left(processor: OneLLMProcessor) -> None:
    long, short = (
        processor.tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("a red circle", "a")
    )
    out = processor(text=["a red circle", "a"])
    gap = len(long) - len(short)
    assert out["input_ids"][0].tolist() == [1, *long]
    assert out["input_ids"][1, gap:].tolist() == [1, *short]
    assert out["attention_mask"].tolist() == [
        [1] * (len(long) + 1),
        [0] * gap + [1] * (len(short) + 1),
    ]
    assert processor(text="")["input_ids"].tolist() == [[1]]


def test_files_tensors_and_raw_signals(processor: OneLLMProcessor, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    np.save(
        tmp_path / "x.npy", np.random.default_rng(0).standard_normal((3, 15724)).astype(np.float32)
    )
    out = processor(
        text="",
        image=tmp_path / "x.png",
        fmri=str(tmp_path / "x.npy"),
        imu=torch.ones(6, 400, dtype=torch.float64),
    )
    assert {k: tuple(v.shape) for k, v in out.items() if k.endswith("_values")} == {
        "image_values": (1, 3, 224, 224),
        "fmri_values": (1, 1, 15724),
        "imu_values": (1, 6, 400),
    }
    assert all(v.dtype == torch.float32 for k, v in out.items() if k.endswith("_values"))
    again = processor(text="", image=tmp_path / "x.png")
    assert torch.equal(out["image_values"], again["image_values"])


def test_wrong_media_is_refused(processor: OneLLMProcessor, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        processor(text="", image=tmp_path / "none.jpg")
    with pytest.raises(UsageError, match="unknown modality 'smell'"):
        processor(text="", smell="x")
    with pytest.raises(UsageError, match="1 imu inputs for 2 prompts"):
        processor(text=["a", "b"], imu=torch.zeros(6, 400))
    (tmp_path / "x.jpg").write_bytes(b"no image")
    with pytest.raises(SampleError):
        processor(text="", image=tmp_path / "x.jpg")


@pytest.mark.parametrize(
    ("name", "item", "says"),
    [
        ("image", torch.zeros(3, 224, 224, dtype=torch.uint8), "Tensor of torch.uint8 and shape"),
        ("image", torch.zeros(3, 60, 80, dtype=torch.uint8), "Tensor of torch.uint8 and shape"),
        ("image", b"bytes", "a bytes is not a medium of modality image"),
        ("image", {"path": "x"}, "a dict is not a medium"),
        ("audio", torch.zeros(16000), "Tensor of torch.float32 and shape (16000,)"),
        ("imu", 7, "a int is not a medium of modality imu"),
        ("image", "https://example.org/x.png", "https://example.org/x.png is a URL"),
    ],
)
def test_what_is_no_medium_is_refused_in_words(
    processor: OneLLMProcessor, name: str, item: object, says: str
) -> None:
    with pytest.raises(UsageError) as error:
        processor(text="", **{name: item})
    assert says in error.value.what and error.value.do
