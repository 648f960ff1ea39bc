"""Tokenizers with tokens that the LLM has no embedding of: right, or refused by name."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from packs import make_pack, small_model
from transformers import AddedToken

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.token_limit import set_token_limit
from onellm_dist.data.text import TextEncoder
from onellm_dist.modalities import Part
from onellm_dist.model import OneLLMProcessor
from onellm_dist.model.presets import load_model, load_toy_tokenizer
from onellm_dist.model.weights.lazy import open_model

ROWS = len(load_toy_tokenizer())
PICTURE, MARK = "<image_soft_token>", "@@mark@@"


def make_tokenizer(**changes: Any) -> Any:
    """The toy tokenizer with a special token and a plain one beyond the embedding."""
    tokenizer = load_toy_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [PICTURE]})
    tokenizer.add_tokens([AddedToken(MARK, special=False)])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small_model(words=ROWS, modalities=["imu"]).save_pretrained(folder)
    OneLLMProcessor(make_tokenizer(pad_token=PICTURE)).save_pretrained(folder)
    return folder


def caption(text: str) -> dict[str, Part]:
    return {"txt": Part("txt", text.encode())}


def talk(answer: str) -> dict[str, Part]:
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": answer}]
    return {"json": Part("json", json.dumps({"conversations": turns}).encode())}


def test_an_unused_token_changes_nothing(folder: Path) -> None:
    """Padding and picture token are beyond the embedding, and prompts of unequal length work."""
    model, processor = load_model(path=folder, preset=None, seed=0)
    assert max(processor.tokenizer.get_vocab().values()) >= ROWS
    assert processor.tokenizer.pad_token_id == ROWS
    model.train(mode=False)
    batch = processor(text=["a red circle", "a"])
    assert int(batch["input_ids"].max()) < ROWS
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    together = model.generate(**batch, **options, eos_token_id=None)
    alone = model.generate(**processor(text="a"), **options, eos_token_id=None)
    assert together[1, -5:].tolist() == alone[0, -5:].tolist()
    # A processor of the user's own does not know the embedding, and pads with the token.
    own = OneLLMProcessor.from_pretrained(folder)(text=["a red circle", "a"])
    assert int(own["input_ids"].max()) == ROWS
    real = batch["attention_mask"] == 1
    assert torch.equal(model(**own).logits[real], model(**batch).logits[real])
    # A row that ends early is filled up with the token, which is then read.
    end = int(together[1, batch["input_ids"].shape[1]])
    ended = model.generate(**own, **options, eos_token_id=end, pad_token_id=ROWS)
    assert ended[1, batch["input_ids"].shape[1] :].tolist() == [end] * 5


def test_a_prompt_with_such_a_token_is_refused_by_name(folder: Path) -> None:
    model, processor = load_model(path=folder, preset=None, seed=0)
    assert int(processor(text=f"a {PICTURE}")["input_ids"].max()) < ROWS  # control tokens are text
    with pytest.raises(UsageError, match=rf"a prompt has '{MARK}' \({ROWS + 1}\)"):
        processor(text=["a", f"a {MARK} b"])
    own = OneLLMProcessor.from_pretrained(folder)(text=f"a {MARK} b")
    for run in (model, model.generate):
        with pytest.raises(UsageError, match=rf"token {max(own['input_ids'][0])}, the LLM has"):
            run(**own)


def test_texts_of_a_dataset(folder: Path) -> None:
    """Special tokens in captions are plain text; others are refused, by name, where they stand."""
    _, processor, _ = open_model(path=folder, preset=None, seed=0)
    encoder = TextEncoder(processor.tokenizer, "caption", 96)
    plain = TextEncoder(load_toy_tokenizer(), "caption", 96)
    for text in ("a red circle", f"a {PICTURE}"):
        assert encoder.encode(caption(text)) == plain.encode(caption(text))
    copy = pickle.loads(pickle.dumps(encoder))  # as loader workers get it
    for one in (encoder, copy):
        with pytest.raises(SampleError, match=rf"its text has '{MARK}' \({ROWS + 1}\)"):
            one.encode_all(caption(f"a {MARK}"))
    conversations = TextEncoder(processor.tokenizer, "conversation", 96)
    conversations.encode(talk("a cube"))
    with pytest.raises(SampleError, match=MARK):
        conversations.encode(talk(MARK))
    # What a text may contain is part of what token counts depend on.
    unlimited = TextEncoder(make_tokenizer(pad_token=PICTURE), "caption", 96)
    assert encoder.fingerprint != unlimited.fingerprint


@pytest.mark.parametrize("token", ["bos_token", "eos_token", "end of a turn"])
def test_a_token_of_every_text_is_refused_at_the_start(folder: Path, token: str) -> None:
    if token == "end of a turn":
        template = "{% for m in messages %}{{ m['role'] + ':\\n' + m['content'] + '" + PICTURE
        template += (
            "\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
        )
        tokenizer = make_tokenizer(chat_template=template)
        TextEncoder(tokenizer, "chat", 96).encode(talk("a cube"))
        set_token_limit(tokenizer, ROWS)
        with pytest.raises(UsageError, match=f"begins or ends texts with '{PICTURE}'"):
            TextEncoder(tokenizer, "chat", 96)
        return
    OneLLMProcessor(make_tokenizer(**{token: PICTURE})).save_pretrained(folder)
    for load in (load_model, open_model):
        with pytest.raises(UsageError, match=f"has token {ROWS} .*its LLM {ROWS} embeddings"):
            load(path=folder, preset=None, seed=0)


def test_vocabularies_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tokenizer = load_toy_tokenizer()
    last = min(i for i in tokenizer.added_tokens_decoder if i > 2) - 1
    small_model(words=last, modalities=["imu"]).save_pretrained(tmp_path)
    OneLLMProcessor(tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=rf"has token {last} .*its LLM {last} embeddings"):
        load_model(path=tmp_path, preset=None, seed=0)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"] = {"type": "WordLevel", "vocab": {}, "unk_token": "x"}
    content["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    kept = {k: v for k, v in config.items() if not k.endswith("_token")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kept))
    with pytest.raises(UsageError, match="its tokenizer has an empty vocabulary"):
        load_model(path=tmp_path, preset=None, seed=0)


def test_a_pack_with_such_a_token_is_refused() -> None:
    model = small_model(modalities=["imu"])
    pack = make_pack([(), ()], [4, 5])
    pack.input_ids[2] = 97
    with pytest.raises(UsageError, match="token 97, the LLM has 97 embeddings"):
        model(packed=pack)


@pytest.mark.parametrize("padding", [True, False], ids=["as a batch", "one at a time"])
def test_no_end_token_means_the_whole_length(padding: bool) -> None:
    """`eos_token_id=None` counts, also for LLMs that take one prompt at a time."""
    model = small_model(modalities=["imu"])
    model.train(mode=False)
    model.llm_support = replace(model.llm_support, padding=padding)
    ids = torch.tensor([[0, 1, 5, 9], [1, 7, 11, 4]])
    mask = (ids > 0).long()
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    free = model.generate(ids, **options, eos_token_id=None)
    assert free.shape == (2, 10)
    ends = free[:, 4].tolist()
    for config in (model.generation_config, model.llm.generation_config):
        config.eos_token_id = ends
    assert model.generate(ids, **options).shape == (2, 5)
    assert torch.equal(model.generate(ids, **options, eos_token_id=None), free)
