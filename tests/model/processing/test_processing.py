"""The processor: prompts and media files to what generate takes."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.turns import ConversationTurn
from onellm_dist.data.text import TextEncoder
from onellm_dist.modalities import Part
from onellm_dist.model import OneLLMProcessor
from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.packed import IGNORE


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
    with pytest.raises(UsageError, match="1 imu input for 2 prompts"):
        processor(text=["a", "b"], imu=torch.zeros(6, 400))
    (tmp_path / "x.jpg").write_bytes(b"no image")
    with pytest.raises(SampleError):
        processor(text="", image=tmp_path / "x.jpg")


@pytest.mark.parametrize(
    ("name", "item", "says"),
    [
        ("image", torch.zeros(3, 224, 224, dtype=torch.uint8), "Tensor of torch.uint8 and shape"),
        ("image", {"path": "x"}, "no file x"),
        ("image", {"picture": "x"}, "a dict is not a medium"),
        ("depth", {"depth": b"x"}, "depth without its image"),
        ("image", "data:image/png;base64,%%%", "its data: URL cannot be decoded"),
        ("audio", torch.zeros(16000), "Tensor of torch.float32 and shape (16000,)"),
        ("imu", 7, "a int is not a medium of modality imu"),
        ("image", "https://example.org/x.png", "https://example.org/x.png is a URL"),
    ],
)
def test_what_is_no_medium_is_refused_in_words(
    processor: OneLLMProcessor, name: str, item: Any, says: str
) -> None:
    with pytest.raises(UsageError) as error:
        processor(text="", **{name: item})
    assert says in error.value.what and error.value.do


def make_pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_is_the_same_in_every_form(processor: OneLLMProcessor, tmp_path: Path) -> None:
    pixels = make_pixels()
    png = encode_png(pixels)
    (tmp_path / "x.png").write_bytes(png)
    wanted = processor(text="", image=tmp_path / "x.png")["image_values"]
    forms: list[Any] = [
        Image.fromarray(pixels),
        pixels,
        pixels.transpose(2, 0, 1),
        pixels / 255,
        torch.from_numpy(pixels).permute(2, 0, 1) / 255,
        torch.from_numpy(pixels),
        png,
        io.BytesIO(png),
        {"bytes": png, "path": None},
        {"bytes": None, "path": str(tmp_path / "x.png")},
        {"image": png},
        "data:image/png;base64," + base64.b64encode(png).decode(),
        [[Image.fromarray(pixels)]],
        [pixels],
    ]
    for form in forms:
        assert torch.equal(processor(text="", images=form)["image_values"], wanted), form
    with pytest.raises(SampleError, match="array of float64"):
        processor(text="", images=pixels.astype(np.float64))  # 0 to 255: not 0 to 1
    with pytest.raises(SampleError):
        processor(text="", images=b"no image")
    with pytest.raises(UsageError, match="image is given twice"):
        processor(text="", images=pixels, image=pixels)
    with pytest.raises(UsageError, match="2 image inputs for one prompt"):
        processor(text="", images=[[pixels, pixels]])


def test_sounds_films_and_pairs_from_memory(processor: OneLLMProcessor, tmp_path: Path) -> None:
    wave = (np.sin(np.arange(16000) * 0.05) * 9000).astype(np.int16)
    soundfile.write(tmp_path / "x.wav", wave, 16000)
    wanted = processor(text="", audio=tmp_path / "x.wav")["audio_values"]
    for form in (wave, wave / 32768, torch.from_numpy(wave / 32768), np.stack([wave, wave * 0])):
        found = processor(text="", audio=form, sampling_rate=16000)["audio_values"]
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    again = processor(text="", audio={"array": wave, "sampling_rate": 16000})["audio_values"]
    torch.testing.assert_close(again, wanted, atol=1e-4, rtol=0)
    pixels = make_pixels()
    both = processor(text="", audio=wave, images=pixels, sampling_rate=16000)
    torch.testing.assert_close(both["audio_values"], wanted, atol=1e-4, rtol=0)
    assert torch.equal(both["image_values"], processor(text="", images=pixels)["image_values"])
    frames = [np.full_like(pixels, 20 * i) for i in range(9)]
    film = processor(text="", videos=[[Image.fromarray(f) for f in frames]])["video_values"]
    assert torch.equal(film, processor(text="", videos=np.stack(frames))["video_values"])
    assert film.shape == (1, 15, 3, 224, 224)
    levels = film[0, ::3].mean((1, 2, 3))
    assert (levels.diff() > 0).all()  # frames 0, 2, 4, 6, 8
    png, grey = encode_png(pixels), encode_png(pixels[..., 0])
    pair = processor(text="", depth={"depth": grey, "image": png})
    assert pair["depth_values"].shape == (1, 2, 3, 224, 224)


def test_rows_take_the_options_of_transformers(processor: OneLLMProcessor) -> None:
    texts = ["a red circle", "a"]
    right = processor(texts, padding_side="right")
    assert right["attention_mask"][1].tolist()[:2] == [1, 1] and right["input_ids"][1, 0] == 1
    assert isinstance(processor(texts, return_tensors="np")["input_ids"], np.ndarray)
    lists = processor(texts, return_tensors=None, padding=False)["input_ids"]
    assert [len(row) for row in lists] == processor(texts)["attention_mask"].sum(1).tolist()
    assert processor(texts, padding="max_length", max_length=40)["input_ids"].shape == (2, 40)
    assert processor(texts, truncation=True, max_length=2)["input_ids"].shape == (2, 2)
    refused: list[dict[str, Any]] = [
        {"return_tensors": "tf"},
        {"padding": "most"},
        {"truncation": True},
    ]
    for options in refused:
        with pytest.raises(UsageError):
            processor(texts, **options)
    with pytest.raises(UsageError, match="padding=False for prompts of several lengths"):
        processor(texts, padding=False)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_chat_processor() -> OneLLMProcessor:
    tokenizer = load_toy_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return OneLLMProcessor(tokenizer)


def test_a_conversation_with_media_has_the_ids_of_training(tmp_path: Path) -> None:
    processor = make_chat_processor()
    png = encode_png(make_pixels())
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    question = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    out = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    encoder = TextEncoder(processor.tokenizer, "chat", 999)
    assert out["input_ids"].tolist() == [encoder.encode_prompt([ConversationTurn("user", "What?")])]
    assert torch.equal(out["image_values"], processor(text="", image=png)["image_values"])
    messages.append({"role": "assistant", "content": "A red circle."})
    out = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    turns = [{"role": "user", "content": "What?"}, messages[1]]
    part = Part("json", json.dumps({"conversations": turns}).encode())
    ids, labels = encoder.encode({"json": part})
    assert out["input_ids"].tolist() == [ids]
    assert out["assistant_masks"].tolist() == [[int(label != IGNORE) for label in labels]]
    text = processor.apply_chat_template(messages)
    assert "What?<|im_end|>" in text and "A red circle." in text
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").read_text() == CHATML


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "tool", "content": "x"}, "role 'tool'"),
        ({"role": "user", "content": [{"type": "smell", "data": "x"}]}, "of type 'smell'"),
        ({"role": "user", "content": [{"type": "image"}]}, "without a medium"),
        ({"role": "user", "content": [{"type": "image", "base64": "%"}]}, "is not base64"),
        ({"role": "user", "content": "\ud83d"}, "half a surrogate pair"),
        ("what?", "role None"),
    ],
)
def test_messages_that_cannot_be_read_are_refused(message: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make_chat_processor().apply_chat_template([message], tokenize=True)
