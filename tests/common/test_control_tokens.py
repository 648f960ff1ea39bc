"""Control tokens written in a text mean the same in training, prompts and chat, or are refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.data.text import TextEncoder
from onellm_dist.modalities.base import Part
from onellm_dist.model import OneLLMProcessor

SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = sorted(set("abdeghimnorstu </>|_.,?<>"))
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def wrap(backend: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **tokens}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen."""
    symbols = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return wrap(backend)


def sentencepiece_bpe(ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """As Llama 2: control tokens are part of the vocabulary of the model."""
    symbols = [*SPECIALS, *(f"<0x{b:02X}>" for b in range(256)), "▁", "is", *CHARACTERS]
    vocabulary = {s: i for i, s in enumerate(dict.fromkeys(symbols))}
    model = models.BPE(
        vocabulary,
        [("i", "s")],
        unk_token="<unk>",
        byte_fallback=True,
        fuse_unk=True,
        ignore_merges=ignore_merges,
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if ignore_merges:
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(backend)


def eager_bpe() -> PreTrainedTokenizerFast:
    """A BPE that looks words up before it merges: it finds a control token that is a word."""
    return sentencepiece_bpe(ignore_merges=True)


def unigram() -> PreTrainedTokenizerFast:
    """As T5 or XGLM: the best way to cut a text up uses a control token as a piece."""
    pieces = [(s, 0.0) for s in SPECIALS] + [(c, -5.0) for c in ["▁", *CHARACTERS]]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return wrap(backend)


def word_level() -> PreTrainedTokenizerFast:
    words = [*SPECIALS, "a", "this", "is", "image"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrap(backend)


def without_bos() -> PreTrainedTokenizerFast:
    """As Qwen: texts begin after `<|endoftext|>`, which is the unknown token as well."""
    symbols = ["<|endoftext|>", *SPECIALS[3:], *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = wrap(backend, eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    tokenizer.bos_token = None
    return tokenizer


CAN_WRITE = (byte_level, sentencepiece_bpe, without_bos)
"""Tokenizers that can encode any text as text."""
CANNOT = (eager_bpe, unigram, word_level)
"""Tokenizers whose model knows control tokens as pieces or words."""
Make = Callable[[], PreTrainedTokenizerFast]


def encode_caption(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    encoder = TextEncoder(tokenizer, "caption", sys.maxsize)
    return encoder.encode({"txt": Part("txt", text.encode())})[0][:-1]


def encode_talk(tokenizer: PreTrainedTokenizerFast, text: str, text_format: str) -> list[int]:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "a"}]
    encoder = TextEncoder(tokenizer, text_format, sys.maxsize)  # type: ignore[arg-type]
    return encoder.encode({"json": Part("json", json.dumps({"conversations": turns}).encode())})[0]


@pytest.mark.parametrize("make", CAN_WRITE)
@pytest.mark.parametrize("token", ["</s>", "<s>", "<|im_end|>", "<|endoftext|>", "<unk>"])
def test_a_control_token_in_a_text_is_text_in_training_and_in_prompts(
    make: Make, token: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = make()
    processor = OneLLMProcessor(tokenizer)
    for text in (f"a {token} this", token, f"{token}a{token}"):
        ids = encode_caption(tokenizer, text)
        assert not set(ids[1:]) & set(tokenizer.all_special_ids)
        assert processor(text=text)["input_ids"][0].tolist() == ids
        # a user of the tokenizer who reads control tokens changes nothing
        assert len(tokenizer(token, add_special_tokens=False)["input_ids"]) <= len(ids) - 1
        assert processor(text=text)["input_ids"][0].tolist() == ids
        conversation = encode_talk(tokenizer, text, "conversation")
        assert not set(conversation[1:-1]) & set(tokenizer.all_special_ids)
    if token in tokenizer.all_special_tokens:
        assert f"contains '{token}', which is read as text" in caplog.text


@pytest.mark.parametrize("make", CANNOT)
def test_a_tokenizer_that_reads_a_control_token_in_any_case_is_refused_the_text(
    make: Make,
) -> None:
    tokenizer = make()
    processor = OneLLMProcessor(tokenizer)
    for text in ("a this image", "zzz is a"):  # the second has an unknown word
        assert processor(text=text)["input_ids"][0].tolist() == encode_caption(tokenizer, text)
    says = "'</s>', which the tokenizer can only read as the control token"
    with pytest.raises(SampleError, match=says):
        encode_caption(tokenizer, "a </s> this")
    with pytest.raises(SampleError, match=says):
        encode_talk(tokenizer, "a </s> this", "conversation")
    with pytest.raises(UsageError, match=says):
        processor(text=["a", "a </s> this"])


@pytest.mark.parametrize("make", CAN_WRITE)
def test_chat_refuses_control_tokens_in_turns_and_in_prompts(make: Make) -> None:
    from onellm_dist.common.turns import ConversationTurn

    tokenizer = make()
    encoder = TextEncoder(tokenizer, "chat", sys.maxsize)
    text = "a <|im_end|> this"
    with pytest.raises(SampleError, match=r"control token '<.im_end.>'"):
        encode_talk(tokenizer, text, "chat")
    with pytest.raises(SampleError, match=r"control token '<.im_end.>'"):
        encoder.encode_prompt([ConversationTurn("user", text)])
    ids = encoder.encode_prompt([ConversationTurn("user", "a this")])
    assert encode_talk(tokenizer, "a this", "chat")[: len(ids)] == ids


def test_a_processor_renders_a_control_token_of_a_chat_and_refuses_to_encode_it() -> None:
    processor = OneLLMProcessor(byte_level())
    messages = [{"role": "user", "content": "a </s>"}]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\na </s><|im_end|><|im_start|>assistant\n"
    with pytest.raises(SampleError, match="contains the control token '</s>'"):
        processor.apply_chat_template(messages, tokenize=True)
