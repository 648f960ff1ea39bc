"""The toy tokenizer: the committed asset, one token a word, exact round trips."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from onellm_dist.shards.sources.toyworld import tokenizer as toy
from onellm_dist.shards.sources.toyworld import world


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return toy.load_toy_tokenizer()


def test_the_committed_asset_is_what_a_build_gives() -> None:
    committed = {path.name: path.read_bytes() for path in sorted(toy.ASSET.iterdir())}
    assert committed == toy.build_files()


def test_special_tokens_are_llamas(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>"]) == [0, 1, 2]
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == toy.VOCABULARY
    assert tokenizer("a red cube")["input_ids"][0] == 1
    assert tokenizer.encode("a red cube", add_special_tokens=False)[0] != 1


@pytest.mark.parametrize("modality", world.MODALITIES)
@pytest.mark.parametrize("lead", ["", " "])
def test_captions_are_one_token_a_word_and_decode_back(
    tokenizer: PreTrainedTokenizerFast, modality: str, lead: str
) -> None:
    for combination in world.list_combinations(modality):
        text = lead + world.make_caption(modality, world.to_attributes(modality, combination))
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) == len(text.split())
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("modality", world.MODALITIES)
def test_prompts_and_the_header_are_words(
    tokenizer: PreTrainedTokenizerFast, modality: str
) -> None:
    header = (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions.\n\n"
        "### Human: " + world.get_scenes(modality).prompt + "\n### Assistant: a red cube\n### "
    )
    ids = tokenizer.encode(header, add_special_tokens=False)
    assert tokenizer.decode(ids) == header
    # Letters left alone would be a word spelled in bytes.
    spelled = [
        t
        for t in tokenizer.convert_ids_to_tokens(ids)
        if len(t) == 1 and t.isalpha() and t not in "ĠĊA"
    ]
    assert spelled == []


@pytest.mark.parametrize(
    "text",
    ["Grüße aus Köln", "日本語 \n\n  two  spaces .a , b\t", "naïve unhappiness 12345 🙂", ""],
)
def test_any_text_decodes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text)
    assert 0 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_auto_tokenizer_loads_it(tokenizer: PreTrainedTokenizerFast) -> None:
    assert AutoTokenizer.from_pretrained(toy.ASSET).get_vocab() == tokenizer.get_vocab()
