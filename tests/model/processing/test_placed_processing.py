"""The processor with several media in a conversation: the tokens and spans of training."""

from __future__ import annotations

import json
import pickle
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from onellm_dist.common.errors import UsageError
from onellm_dist.common.placeholders import list_medium_spans
from onellm_dist.data.media_text import MediaTextEncoder
from onellm_dist.data.text import TextEncoder
from onellm_dist.modalities import Part, all_modalities
from onellm_dist.model.presets import load_model
from onellm_dist.model.processing.processor import OneLLMProcessor
from onellm_dist.serving import generate as g
from onellm_dist.serving.media import read_media

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    model, processor = load_model(path=None, preset="toy", seed=3)
    processor.tokenizer.chat_template = TEMPLATE
    model.train(False)
    return model, processor


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    for name in "abc":
        pixels = rng.integers(0, 255, (60, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    with wave.open(str(tmp_path / "s.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes((np.sin(np.arange(16000) / 7) * 9000).astype("<i2").tobytes())
    return {p.stem: p for p in tmp_path.iterdir()}


def ask(files: dict[str, Path]) -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "which of "},
                {"type": "image", "path": str(files["a"])},
                {"type": "image", "path": str(files["b"])},
                {"type": "text", "text": " sounds like "},
                {"type": "audio", "path": str(files["s"])},
                {"type": "text", "text": " or "},
                {"type": "image", "path": str(files["c"])},
            ],
        }
    ]


def test_three_pictures_and_a_sound_are_the_same_tokens_in_every_way(
    loaded: tuple[Any, Any], files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processor, `onellm generate` and training."""
    model, processor = loaded
    data = processor.apply_chat_template(
        ask(files), tokenize=True, return_dict=True, add_generation_prompt=True
    )
    seen: dict[str, Any] = {}

    def record(ids: torch.Tensor, mask: torch.Tensor, **given: Any) -> torch.Tensor:
        seen.update(given, ids=ids)
        return torch.cat([ids, ids[:, :1]], 1)

    monkeypatch.setattr(model, "generate", record)
    text = "which of <image><image> sounds like <audio> or <image>"
    listed = [("image", files[n]) for n in "abc"] + [("audio", files["s"])]
    g.generate(model, processor.tokenizer, text, read_media(listed, {}), chat=True)
    monkeypatch.undo()
    assert seen["ids"].tolist() == data["input_ids"].tolist()
    assert seen["media_spans"] == data["media_spans"]
    for name in ("image_values", "audio_values"):
        assert torch.equal(seen[name], data[name])
    base = TextEncoder(processor.tokenizer, "chat", 1000)
    encoder = MediaTextEncoder(base, tuple(all_modalities()))
    meta = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]}
    sample = {"json": Part("json", json.dumps(meta).encode())}
    trained = encoder.encode_media(sample, ["image", "image", "image", "audio"])
    prompt = data["input_ids"][0].tolist()
    assert trained.ids[: len(prompt)] == prompt
    assert [place for _, place in data["media_spans"][0]] == [m.place for m in trained.media]
    with torch.no_grad():
        out = model.generate(**data, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > len(prompt)


def test_a_batch_of_conversations_with_different_media(
    loaded: tuple[Any, Any], files: dict[str, Path]
) -> None:
    model, processor = loaded
    talks = [ask(files), [{"role": "user", "content": "nothing to see"}]]
    data = processor.apply_chat_template(
        talks, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    assert [len(spans) for spans in data["media_spans"]] == [4, 0]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    both = model.generate(**data, **options)
    length = data["input_ids"].shape[1]
    for row, talk in enumerate(talks):
        alone = processor.apply_chat_template(
            talk, tokenize=True, return_dict=True, add_generation_prompt=True, place_media=True
        )
        one = model.generate(**alone, **options)
        assert one[0, alone["input_ids"].shape[1] :].tolist() == both[row, length:].tolist()


def test_one_medium_of_a_modality_stays_behind_bos(
    loaded: tuple[Any, Any], files: dict[str, Path]
) -> None:
    _, processor = loaded
    talk = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "see "},
                {"type": "image", "path": str(files["a"])},
            ],
        }
    ]
    plain = processor.apply_chat_template(talk, tokenize=True, return_dict=True)
    assert "media_spans" not in plain and plain["image_values"].shape[0] == 1
    placed = processor.apply_chat_template(
        talk, tokenize=True, return_dict=True, place_media=True, return_assistant_tokens_mask=True
    )
    ((name, place),) = placed["media_spans"][0]
    assert name == "image" and place > 1
    assert placed["input_ids"].tolist() == plain["input_ids"].tolist()
    assert placed["assistant_masks"].shape == placed["input_ids"].shape


def test_spans_of_training_are_kept_by_the_processor(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    _, processor = loaded
    wide = tmp_path / "wide.png"
    Image.new("RGB", (900, 300)).save(wide)
    own = OneLLMProcessor(pickle.loads(pickle.dumps(processor.tokenizer)), spans={"image": 5})
    own.save_pretrained(tmp_path / "saved")
    again = OneLLMProcessor.from_pretrained(tmp_path / "saved")
    assert dict(again.spans) == {"image": 5}
    talk = [{"role": "user", "content": [{"type": "image", "path": str(wide)}]}]
    data = again.apply_chat_template(talk, tokenize=True, return_dict=True, place_media=True)
    assert len(data["media_spans"][0]) == 4 == len(data["image_values"])
    processor.save_pretrained(tmp_path / "plain")
    assert "spans" not in (tmp_path / "plain" / "processor_config.json").read_text()


def test_the_rest_of_a_batch_moves_no_picture(
    loaded: tuple[Any, Any], files: dict[str, Path]
) -> None:
    _, processor = loaded
    picture = {"type": "image", "path": str(files["a"])}
    one = [{"role": "user", "content": [{"type": "text", "text": "see "}, picture]}]
    data = processor.apply_chat_template(
        [one, ask(files), [{"role": "user", "content": "no"}]], tokenize=True, return_dict=True
    )
    assert data["media_spans"][0] == [("image", 1)]
    assert [len(spans) for spans in data["media_spans"]] == [1, 4, 0]
    alone = processor.apply_chat_template(one, tokenize=True, return_dict=True)
    assert torch.equal(alone["image_values"][0], data["image_values"][0])


def test_every_way_to_ask_takes_the_spans_of_training(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    _, processor = loaded
    wide = tmp_path / "wide.png"
    Image.new("RGB", (900, 300)).save(wide)
    own = OneLLMProcessor(pickle.loads(pickle.dumps(processor.tokenizer)), spans={"image": 5})
    asked = own(text=["what", "and"], images=[str(wide)] * 2, truncation=True, max_length=2)
    assert asked["media_spans"] == [list_medium_spans("image", 1, 4)] * 2
    assert len(asked["image_values"]) == 8 and asked["input_ids"].shape == (2, 2)
    part = {"type": "image", "path": str(wide)}
    talk = [{"role": "user", "content": [{"type": "text", "text": "see "}, part]}]
    for place in (None, False):
        data = own.apply_chat_template(talk, tokenize=True, return_dict=True, place_media=place)
        ((name, at), *_) = data["media_spans"][0]
        assert name == "image" and len(data["media_spans"][0]) == 4 and (at > 1) == (place is None)
    assert "media_spans" not in own("no media")


def test_media_in_memory_take_the_spans_of_their_files(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    _, processor = loaded
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (150, 450, 3), dtype=np.uint8)
    sound = (rng.normal(size=25 * 8000) * 3000).astype(np.int16)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    soundfile.write(tmp_path / "long.wav", sound, 8000)
    own = OneLLMProcessor(
        pickle.loads(pickle.dumps(processor.tokenizer)), spans={"image": 5, "audio": 4, "video": 4}
    )
    files: dict[str, Any] = {"images": tmp_path / "wide.png", "audio": tmp_path / "long.wav"}
    wanted = own(text="what", **files)
    tiles, windows = list_medium_spans("image", 1, 4), list_medium_spans("audio", 1, 3)
    assert wanted["media_spans"] == [tiles + windows]
    timed = {"array": sound, "sampling_rate": 8000}
    for form, heard, rate in (
        (Image.fromarray(pixels), timed, None),
        (pixels, sound, 8000),
        (torch.from_numpy(pixels).permute(2, 0, 1), sound / 32768, 8000),
        (pixels / 255, torch.from_numpy(sound / 32768), 8000),
    ):
        found = own(text="what", images=form, audio=heard, sampling_rate=rate)
        assert found["media_spans"] == wanted["media_spans"]
        for name in ("image_values", "audio_values"):
            assert torch.equal(found[name], wanted[name]), (type(form), type(heard))
    part = {"type": "image", "image": Image.fromarray(pixels)}
    talk = [{"role": "user", "content": [part, {"type": "audio", "audio": timed}]}]
    placed = own.apply_chat_template(talk, tokenize=True, return_dict=True)
    assert torch.equal(placed["image_values"], wanted["image_values"])
    assert torch.equal(placed["audio_values"], wanted["audio_values"])
    film = own(text="what", videos=[[Image.fromarray(pixels)] * 9])
    assert len(film["video_values"]) == 1  # nothing says how long it is
    for bad, says in (({"images": 7}, "a int is not a medium"), ({"audio": sound}, "not a medium")):
        with pytest.raises(UsageError, match=says):
            own(text="what", **bad)


def test_spans_are_given_in_every_form_of_tensors(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    _, processor = loaded
    own = OneLLMProcessor(pickle.loads(pickle.dumps(processor.tokenizer)), spans={"image": 5})
    wide = Image.new("RGB", (900, 300), "red")
    wanted = own(text="what", images=wide)
    arrays = own(text="what", images=wide, return_tensors="np")
    lists = own(text="what", images=wide, return_tensors=None)
    assert isinstance(arrays["input_ids"], np.ndarray) and isinstance(lists["input_ids"], list)
    assert isinstance(arrays["image_values"], np.ndarray)
    for found in (arrays, lists):
        assert found["media_spans"] == wanted["media_spans"] and len(wanted["media_spans"][0]) == 4
        assert np.array_equal(found["image_values"], wanted["image_values"])
        assert np.array_equal(found["input_ids"], wanted["input_ids"])


def test_what_cannot_be_placed_is_refused(loaded: tuple[Any, Any], files: dict[str, Path]) -> None:
    _, processor = loaded
    with pytest.raises(UsageError, match="media inside the text"):
        processor.apply_chat_template(
            ask(files), tokenize=True, return_dict=True, truncation=True, max_length=8
        )
    talk = ask(files)
    talk[0]["content"].append({"type": "text", "text": "\ue0f0image\ue0f1"})
    with pytest.raises(UsageError, match=r"message 0 has the character U\+E0F0"):
        processor.apply_chat_template(talk, tokenize=True, return_dict=True)
