"""Placeholders in texts: taken out, and where the media stand."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from data_worlds import tokenizer
from hypothesis import given
from hypothesis import strategies as st

from onellm_dist.common.errors import SampleError
from onellm_dist.common.turns import ConversationTurn
from onellm_dist.data.media_text import MediaTextEncoder
from onellm_dist.data.text import TextEncoder
from onellm_dist.modalities import Part
from onellm_dist.packed import IGNORE

NAMES = ("image", "audio", "video")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _encoder(text_format: Any = "conversation", most: int = 500) -> MediaTextEncoder:
    tok = tokenizer()
    return MediaTextEncoder(TextEncoder(tok, text_format, most), NAMES)


def _talk(*turns: Any, **meta: Any) -> dict[str, Part]:
    listed = [
        {"role": "user" if i % 2 == 0 else "assistant", "content": turn}
        for i, turn in enumerate(turns)
    ]
    return {"json": Part("json", json.dumps({"messages": listed, **meta}).encode())}


def _decode(ids: list[int]) -> str:
    return str(tokenizer().decode(ids, skip_special_tokens=True))


def test_media_stand_where_their_placeholders_do() -> None:
    encoder = _encoder()
    found = encoder.encode_media(
        _talk("a red <image> cube <audio> and <image> here", "a blue sphere"),
        ["image", "image", "audio"],
    )
    assert [m.number for m in found.media] == [0, 2, 1]
    befores = [_decode(found.ids[: m.place]).split("Human:")[1] for m in found.media]
    assert [b.replace(" ", "") for b in befores] == ["ared", "aredcube", "aredcubeand"]
    supervised = [i for i, label in zip(found.ids, found.labels, strict=True) if label != IGNORE]
    assert "a blue sphere" in _decode(supervised)
    assert "image" not in _decode(found.ids) and "<" not in _decode(found.ids)


def test_media_without_placeholders_stand_behind_bos_in_the_papers_order() -> None:
    found = _encoder().encode_media(_talk("what <image>", "a cube"), ["audio", "image", "video"])
    assert [(m.number, m.place) for m in found.media[:2]] == [(2, 1), (0, 1)]
    assert found.media[2].number == 1 and found.media[2].place > 1
    plain = TextEncoder(tokenizer(), "conversation", 500).encode(_talk("what is it", "a cube"))
    none = _encoder().encode_media(_talk("what is it", "a cube"), ["image", "audio"])
    assert (none.ids, none.labels) == plain
    assert [(m.number, m.place) for m in none.media] == [(0, 1), (1, 1)]


def test_placeholders_in_an_answer_and_in_a_caption() -> None:
    found = _encoder().encode_media(_talk("draw", "here <image> it is"), ["image"])
    assert found.labels[found.media[0].place] == found.ids[found.media[0].place]
    caption = {"txt": Part("txt", b"<image> a red cube <image> a blue sphere")}
    found = _encoder("caption").encode_media(caption, ["image", "image"])
    assert found.media[0].place == 1 < found.media[1].place < len(found.ids)
    assert found.labels == [IGNORE, *found.ids[1:]]


def test_content_parts_are_placeholders() -> None:
    parts = [
        {"type": "text", "text": "first "},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "text", "text": " then "},
        {"type": "image"},
        {"type": "input_audio", "input_audio": {}},
    ]
    written = _encoder().encode_media(
        _talk("first <image> then <image><audio>", "a cube"), ["image", "image", "audio"]
    )
    assert _encoder().encode_media(_talk(parts, "a cube"), ["image", "image", "audio"]) == written


@pytest.mark.parametrize(
    ("text", "media", "words"),
    [
        ("<image> <image>", ["image"], "2 <image> for 1 medium"),
        ("<image>", [], "1 <image> for 0 media"),
        ("<audio>", ["image"], "1 <audio> for 0 media"),
        ("<image>", ["image", "image"], "1 <image> for 2 media"),
        ("a \ue0f0 b", ["image"], "U+E0F0"),
    ],
)
def test_a_count_that_does_not_fit_is_refused_by_name(
    text: str, media: list[str], words: str
) -> None:
    with pytest.raises(SampleError, match=words.replace("+", r"\+")):
        _encoder().encode_media(_talk(text, "a cube"), media)


def test_tags_of_modalities_that_the_dataset_does_not_have_are_text() -> None:
    found = _encoder().encode_media(_talk("what is <imu> for", "a cube"), [])
    assert "imu" in _decode(found.ids).replace(" ", "")


def test_a_cut_text_keeps_its_media_at_its_end() -> None:
    words = "a red cube left of a small blue sphere " * 3
    encoder = _encoder("caption", most=8)
    found = encoder.encode_media(
        {"txt": Part("txt", f"<image> {words} <image>".encode())}, ["image", "image"]
    )
    assert len(found.ids) == 8
    assert [m.place for m in found.media] == [1, 8]


@given(
    st.lists(st.sampled_from(["red", "cube", "a", "<image>", "<audio>", "\n", " "]), max_size=12)
)
def test_what_stands_around_placeholders_is_unchanged(words: list[str]) -> None:
    """Any text: as many places as placeholders, ascending, and no token of a placeholder left."""
    text = " ".join(["x", *words])
    media = [w[1:-1] for w in words if w.startswith("<")]
    encoder = _encoder("caption")
    found = encoder.encode_media({"txt": Part("txt", text.encode())}, media)
    places = [m.place for m in found.media]
    assert places == sorted(places) and len(places) == len(media)
    assert sorted(m.number for m in found.media) == list(range(len(media)))
    assert all(0 <= i < len(tokenizer()) for i in found.ids)
    # in the order of the text, each modality's media ascend
    for name in NAMES:
        own = [m.number for m in found.media if media[m.number] == name]
        assert own == sorted(own)


def test_an_encoder_travels_to_other_processes() -> None:
    encoder = _encoder()
    copy = pickle.loads(pickle.dumps(encoder))
    sample = _talk("a <image> b", "a cube")
    assert copy.encode_media(sample, ["image"]) == encoder.encode_media(sample, ["image"])


def test_the_chat_format_places_media_too() -> None:
    tok = pickle.loads(pickle.dumps(tokenizer()))
    tok.chat_template = CHAT
    encoder = MediaTextEncoder(TextEncoder(tok, "chat", 500), NAMES)
    whole = encoder.encode_media(_talk("a <image> cube", "a blue sphere"), ["image"])
    prompt = encoder.encode_media_prompt([ConversationTurn("user", "a <image> cube")], ["image"])
    assert whole.ids[: len(prompt.ids)] == prompt.ids
    assert whole.media == prompt.media
    assert prompt.media[0].place > 1
