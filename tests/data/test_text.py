"""Captions and conversations: the ids, and exactly which of them are supervised."""

from __future__ import annotations

import json
from typing import Any

import pytest
from data_worlds import encode, tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.data.text import HEADER, TextEncoder, render_conversation
from onellm_dist.data.text_parts import read_turns
from onellm_dist.modalities import Part
from onellm_dist.packed import IGNORE


def caption_parts(text: str) -> dict[str, Part]:
    return {"txt": Part("txt", text.encode())}


def talk_parts(*values: str) -> dict[str, Part]:
    turns = [
        {"from": "human" if i % 2 == 0 else "gpt", "value": value} for i, value in enumerate(values)
    ]
    return {"json": Part("json", json.dumps({"conversations": turns}).encode())}


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer like LLaMA's: words carry the space before them, and a text begins with one."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(
        [HEADER + "### Human: what is it\n### Assistant: a red cube 42\n### "] * 4, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def supervised(labels: list[int]) -> list[list[int]]:
    """The sequences of supervised labels that follow each other."""
    runs: list[list[int]] = []
    for before, label in zip([IGNORE, *labels], labels, strict=False):
        if label != IGNORE:
            if before == IGNORE:
                runs.append([])
            runs[-1].append(label)
    return runs


def test_a_caption_is_bos_text_eos_and_all_but_bos_is_supervised() -> None:
    tok = tokenizer()
    ids, labels = encode(caption_parts("a red cube"), tok, "caption", 96)
    assert ids == [
        tok.bos_token_id,
        *tok("a red cube", add_special_tokens=False)["input_ids"],
        tok.eos_token_id,
    ]
    assert labels == [IGNORE, *ids[1:]]


def test_a_long_caption_is_cut_as_the_reference_cuts_it() -> None:
    tok = tokenizer()
    whole, _ = encode(caption_parts("a red cube " * 30), tok, "caption", 1000)
    ids, labels = encode(caption_parts("a red cube " * 30), tok, "caption", 20)
    assert ids == whole[:20]
    assert len(labels) == 20
    assert tok.eos_token_id not in ids


def test_an_empty_caption_teaches_the_end() -> None:
    tok = tokenizer()
    assert encode(caption_parts(""), tok, "caption", 96) == (
        [tok.bos_token_id, tok.eos_token_id],
        [IGNORE, tok.eos_token_id],
    )


def test_txt_precedes_json_and_json_is_used_without_txt() -> None:
    tok = tokenizer()
    meta = {"json": Part("json", b'{"caption": "a blue sphere"}')}
    assert encode(meta, tok, "caption", 96) == encode(
        caption_parts("a blue sphere"), tok, "caption", 96
    )
    assert encode(meta | caption_parts("a red cube"), tok, "caption", 96) == encode(
        caption_parts("a red cube"), tok, "caption", 96
    )


def test_special_tokens_in_a_text_are_text() -> None:
    tok = tokenizer()
    ids, _ = encode(caption_parts("a </s> b <s>"), tok, "caption", 96)
    assert ids.count(tok.eos_token_id) == 1
    assert ids.count(tok.bos_token_id) == 1
    assert tok.decode(ids[1:-1]) == "a </s> b <s>"


def test_truncation_left_on_by_another_user_of_the_tokenizer_does_not_count() -> None:
    backend = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    tok = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tok(["a red cube", "a"], truncation=True, max_length=2, padding=True)
    assert len(TextEncoder(tok, "caption", 96).encode(caption_parts("a red cube"))[0]) == 5


def test_the_conversation_is_the_references_prompt() -> None:
    text, answers = render_conversation(
        read_turns(talk_parts("<image>\nwhat is it", "a cube", "which colour", "red"))
    )
    assert (
        text
        == HEADER
        + "### Human: what is it\n### Assistant: a cube\n"
        + "### Human: which colour\n### Assistant: red\n### "
    )
    assert [text[a:b] for a, b in answers] == [" a cube\n###", " red\n###"]
    assert HEADER.endswith("answers to the human's questions.\n\n")


@pytest.mark.parametrize("make", [tokenizer, sentencepiece_like])
def test_a_conversation_is_one_string_with_bos_and_eos(make: Any) -> None:
    tok = make()
    parts = talk_parts("what is it", "a red cube")
    text, _ = render_conversation(read_turns(parts))
    ids, labels = encode(parts, tok, "conversation", 2018)
    assert ids == [
        tok.bos_token_id,
        *tok(text, add_special_tokens=False)["input_ids"],
        tok.eos_token_id,
    ]
    assert labels[0] == labels[-1] == IGNORE
    assert all(label in (IGNORE, token) for label, token in zip(labels, ids, strict=True))


@pytest.mark.parametrize("make", [tokenizer, sentencepiece_like])
def test_answers_and_their_end_are_supervised_and_nothing_else(make: Any) -> None:
    """Repeated answers, answers inside questions, answers that begin with a digit.

    Searching for the ids of an answer gets these wrong.
    """
    tok = make()
    values = ("a red cube", "42", "is it 42", "a red cube", "a red cube", "a red cube")
    _, labels = encode(talk_parts(*values), tok, "conversation", 2018)
    assert [tok.decode(run).strip(" ") for run in supervised(labels)] == [
        "42\n###",
        "a red cube\n###",
        "a red cube\n###",
    ]


@given(
    values=st.lists(st.text(min_size=0, max_size=30), min_size=2, max_size=8).filter(
        lambda v: not any("<image>" in x for x in v)
    )
)
@settings(max_examples=150, deadline=None)
@pytest.mark.seconds
def test_supervised_tokens_decode_to_the_answers(values: list[str]) -> None:
    """Any Unicode; the toy tokenizer works on bytes, so decoding gives the exact text."""
    tok = tokenizer()
    values = values[: len(values) // 2 * 2]
    ids, labels = encode(talk_parts(*values), tok, "conversation", 100_000)
    expected = [f" {answer}\n###" for answer in values[1::2]]
    assert [
        tok.decode(run, clean_up_tokenization_spaces=False) for run in supervised(labels)
    ] == expected
    assert len(ids) == len(labels)


def test_a_system_turn_replaces_the_header_and_roles_are_read_too() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "what"},
        {"role": "assistant", "content": "a cube"},
    ]
    parts = {"json": Part("json", json.dumps({"conversations": messages}).encode())}
    text, answers = render_conversation(read_turns(parts))
    assert text == "Be brief.\n\n### Human: what\n### Assistant: a cube\n### "
    assert [text[a:b] for a, b in answers] == [" a cube\n###"]
    later = {
        "json": Part("json", json.dumps({"conversations": [*messages[1:], messages[0]]}).encode())
    }
    with pytest.raises(SampleError, match="turn 2 is a system turn"):
        read_turns(later)


def test_of_several_captions_one_is_chosen() -> None:
    tok = tokenizer()
    several = {
        "json": Part("json", json.dumps({"caption": ["a red cube", "a cube", "it"]}).encode())
    }
    encoder = TextEncoder(tok, "caption", 96)
    variants = encoder.encode_all(several)
    assert variants == [
        encode(caption_parts(text), tok, "caption", 96) for text in ("a red cube", "a cube", "it")
    ]
    assert encoder.encode(several) == variants[0]
    assert encoder.encode(several, lambda count: count - 1) == variants[2]
    assert encoder.encode(caption_parts("a red cube"), lambda count: 1 // 0) == variants[0], (
        "one caption is not a choice"
    )


def test_a_conversation_is_cut_with_its_labels() -> None:
    parts = talk_parts("what is it", "a red cube", "and now", "a blue sphere")
    ids, labels = encode(parts, tokenizer(), "conversation", 2018)
    for length in (2, 40, 48, 55):
        assert encode(parts, tokenizer(), "conversation", length) == (ids[:length], labels[:length])


@pytest.mark.parametrize(
    ("parts", "text_format", "says"),
    [
        ({"txt": Part("txt", b"caf\xe9")}, "caption", "not UTF-8"),
        ({}, "caption", "no caption"),
        ({"json": Part("json", b'{"caption": 3}')}, "caption", "no caption"),
        ({"json": Part("json", b'{"caption": []}')}, "caption", "no caption"),
        ({"json": Part("json", b'{"captions": ["a", 3]}')}, "caption", "no caption"),
        ({"json": Part("json", b"{")}, "caption", "not JSON"),
        ({"json": Part("json", b"[1]")}, "caption", "not a JSON object"),
        ({"txt": Part("txt", b"a")}, "conversation", "no `conversations`"),
        ({"json": Part("json", b'{"conversations": [{"from": "gpt"}]}')}, "conversation", "turn 0"),
        (
            {"json": Part("json", b'{"conversations": [{"from": "dog", "value": "wau"}]}')},
            "conversation",
            "turn 0",
        ),
        (
            {"json": Part("json", b'{"conversations": [{"from": "human", "value": "hm"}]}')},
            "conversation",
            "no answer",
        ),
        (
            {"json": Part("json", b'{"caption": ["ok", "a\\ud83d"]}')},
            "caption",
            "its caption is not valid text: half a surrogate pair",
        ),
        (
            {"json": Part("json", b'{"conversations": [{"from": "gpt", "value": "\\udc00"}]}')},
            "conversation",
            "turn 0 is not valid text",
        ),
        (
            {"json": Part("json", b'{"caption": "a", "n": ' + b"9" * 5000 + b"}")},
            "caption",
            "not JSON",
        ),
    ],
)
def test_bad_text_says_what_is_wrong(parts: dict[str, Part], text_format: Any, says: str) -> None:
    with pytest.raises(SampleError, match=says):
        encode(parts, tokenizer(), text_format, 96)


def test_tokenizers_that_cannot_serve_are_refused() -> None:
    without_bos = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), unk_token="<unk>"
    )
    with pytest.raises(UsageError, match="no BOS"):
        TextEncoder(without_bos, "caption", 96)
    with pytest.raises(UsageError, match="not a fast one"):
        TextEncoder(object(), "caption", 96)
    with pytest.raises(UsageError, match="max_text_tokens=1"):
        TextEncoder(tokenizer(), "caption", 1)


def test_the_fingerprint_follows_what_token_counts_depend_on() -> None:
    prints = {
        TextEncoder(tok, text_format, length).fingerprint
        for tok in (tokenizer(), sentencepiece_like())
        for text_format in ("caption", "conversation")
        for length in (96, 97)
    }
    assert len(prints) == 8
    assert TextEncoder(tokenizer(), "caption", 96).fingerprint in prints
