"""A start says how many samples their text format leaves out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_worlds import section, tokenizer, write
from transformers import PreTrainedTokenizerFast

from onellm_dist.data.corpus import Corpus
from onellm_dist.shards.format.writer import DatasetWriter

NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('system turns are not taken') }}{% endif %}"
    "{{ m['role'] + ':\\n' + m['content'] }}{% if m['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    tok: PreTrainedTokenizerFast = tokenizer()
    tok.chat_template = NO_SYSTEM
    return tok


def test_every_start_says_how_many_samples_the_template_refuses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Mistral's template, which takes no system turn (every second sample has one)."""
    with DatasetWriter(tmp_path / "talk", name="talk", modalities=(), max_samples=4) as writer:
        for number in range(10):
            talk = [{"from": "human", "value": "hm"}, {"from": "gpt", "value": "a cube"}]
            if number % 2:
                talk.insert(0, {"from": "system", "value": "Be brief."})
            parts = {"json": json.dumps({"conversations": talk}).encode()}
            writer.add("train", f"k{number}", parts)
    write(tmp_path, "fine", [], 5)
    data = section(tmp_path, {"talk": 1.0, "fine": 1.0}, text_format="chat")
    for _ in range(2):  # the second start finds the token counts of the first
        caplog.clear()
        Corpus.open(data, make_tokenizer(), 0, (), show=False)
        (record,) = caplog.records
        assert record.getMessage().startswith("dataset talk: 5 of 10 samples have no text")
        assert "system turns are not taken" in record.getMessage()
    caplog.clear()
    Corpus.open(data, make_tokenizer(), 0, (), show=False, build_counts=False)
    assert not caplog.records
