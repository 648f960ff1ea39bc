"""Conversations in the LLM's own chat template: its exact ids, its answers and nothing else."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from data_worlds import tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.turns import ConversationTurn
from onellm_dist.data.chat import ChatTemplate
from onellm_dist.data.text import TextEncoder
from onellm_dist.modalities import Part
from onellm_dist.packed import IGNORE

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no system turns here') }}{% endif %}{% endfor %}"
)
FORGETS = (
    "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}"
    "{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
"""Drops every answer but the last, as templates of reasoning models drop thoughts."""
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def chatty(template: str, *, bos: str = "<s>") -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    tok = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token="</s>", unk_token="<unk>"
    )
    tok.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tok.chat_template = template
    return tok


def talk(*values: str, system: str | None = None) -> dict[str, Part]:
    turns = [
        {"from": "human" if i % 2 == 0 else "gpt", "value": value} for i, value in enumerate(values)
    ]
    if system is not None:
        turns.insert(0, {"from": "system", "value": system})
    return {"json": Part("json", json.dumps({"conversations": turns}).encode())}


def supervised(tok: Any, labels: list[int]) -> list[str]:
    runs: list[list[int]] = []
    for before, label in zip([IGNORE, *labels], labels, strict=False):
        if label != IGNORE:
            if before == IGNORE:
                runs.append([])
            runs[-1].append(label)
    return [tok.decode(run, clean_up_tokenization_spaces=False) for run in runs]


VALUES = ("what is it", "a red cube", "is it a red cube", "a red cube", "sure", "42")
MESSAGES = [
    {"role": "user" if i % 2 == 0 else "assistant", "content": value}
    for i, value in enumerate(VALUES)
]


@pytest.mark.parametrize(
    ("template", "end", "begins_with_bos"),
    [(CHATML, "<|im_end|>", False), (CHATML_MARKED, "<|im_end|>", False), (LLAMA2, " </s>", True)],
    ids=["chatml", "chatml_marked", "llama2"],
)
def test_ids_are_the_templates_and_every_answer_with_its_end_is_supervised(
    template: str, end: str, begins_with_bos: bool
) -> None:
    tok = chatty(template)
    ids, labels = TextEncoder(tok, "chat", 2018).encode(talk(*VALUES))
    own = tok.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert ids == (own if begins_with_bos else [tok.bos_token_id, *own])
    assert labels[0] == IGNORE
    assert all(label in (IGNORE, token) for label, token in zip(labels, ids, strict=True))
    space = " " if begins_with_bos else ""
    assert supervised(tok, labels) == [f"{space}{answer}{end}" for answer in VALUES[1::2]]


def test_the_two_ways_to_find_answers_agree() -> None:
    plain, marked = (TextEncoder(chatty(t), "chat", 2018) for t in (CHATML, CHATML_MARKED))
    for parts in (
        talk(*VALUES),
        talk("hm", "a</s b", system="Be brief."),
        talk("", "x"),
        talk("a", " padded \n"),
    ):
        assert plain.encode(parts) == marked.encode(parts)
    assert plain.fingerprint != marked.fingerprint


def test_a_system_turn_is_the_templates_and_is_not_supervised() -> None:
    tok = chatty(CHATML)
    ids, labels = TextEncoder(tok, "chat", 2018).encode(talk("what", "a cube", system="Be brief."))
    assert str(tok.decode(ids[1:])).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"
    )
    assert supervised(tok, labels) == ["a cube<|im_end|>"]
    with pytest.raises(SampleError, match="no system turns here"):
        TextEncoder(chatty(LLAMA2), "chat", 2018).encode(talk("what", "a cube", system="Be brief."))


def test_a_token_that_opens_turns_is_not_taken_for_the_beginning_of_the_text() -> None:
    """SmolLM2's BOS is <|im_start|>.

    The media follow a BOS of their own and do not stand between <|im_start|> and the role.
    """
    tok = chatty(CHATML, bos="<|im_start|>")
    ids, _ = TextEncoder(tok, "chat", 2018).encode(talk("what", "a cube"))
    assert str(tok.decode(ids)).startswith("<|im_start|><|im_start|>user")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (FORGETS, "changes the turns before turn"),
        (
            THINKS,
            "prompt and the answer in turn 1 its chat template writes '<think></think>'",
        ),
        (ENDLESS, "nothing after the answer in turn 1"),
        (None, "has no chat template"),
    ],
    ids=["forgets", "thinks", "endless", "none"],
)
def test_templates_that_cannot_be_supervised_exactly_are_refused(template: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TextEncoder(chatty(template), "chat", 2018)


def test_control_tokens_in_a_turn_are_refused() -> None:
    with pytest.raises(SampleError, match="control token '<|im_end|>'".replace("|", r"\|")):
        TextEncoder(chatty(CHATML), "chat", 2018).encode(talk("what<|im_end|>\nyes", "a cube"))


def test_tokens_across_the_border_of_an_answer_are_refused() -> None:
    """A word tokenizer without a pre-tokenizer would join the end of the prompt with the answer."""
    from tokenizers import models

    vocabulary = {
        "<unk>": 0,
        "<s>": 1,
        "</s>": 2,
        **{c: i + 3 for i, c in enumerate("qa:. ")},
        ":a": 8,
    }
    tok = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [(":", "a")], unk_token="<unk>")),
        bos_token="<s>",
        eos_token="</s>",
    )
    tok.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}:"
        "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    encoder = TextEncoder(tok, "chat", 2018)
    assert supervised(tok, encoder.encode(talk("q", "q"))[1]) == ["q </s>"]
    with pytest.raises(SampleError, match="one token of ':a'"):
        encoder.encode(talk("q", "a"))


def test_encoders_can_be_sent_to_workers() -> None:
    encoder = TextEncoder(chatty(CHATML), "chat", 60)
    again = pickle.loads(pickle.dumps(encoder))
    assert again.encode(talk(*VALUES)) == encoder.encode(talk(*VALUES))
    assert (
        again.fingerprint
        == encoder.fingerprint
        == TextEncoder(chatty(CHATML), "chat", 60).fingerprint
    )


def test_a_prompt_ends_where_the_answer_begins() -> None:
    template = ChatTemplate(chatty(CHATML))
    turns = [ConversationTurn("user", "what is it"), ConversationTurn("assistant", "a cube")]
    text, ((start, _),) = template.render(turns)
    assert template.render_prompt(turns[:1]) == text[:start]


@pytest.mark.parametrize(
    "template", [CHATML, CHATML_MARKED, LLAMA2], ids=["chatml", "chatml_marked", "llama2"]
)
def test_generation_continues_where_training_supervises(template: str) -> None:
    tok = chatty(template)
    encoder = TextEncoder(tok, "chat", 2018)
    ids, labels = encoder.encode(talk("what is it", "a cube"))
    first = next(i for i, label in enumerate(labels) if label != IGNORE)
    assert encoder.encode_prompt([ConversationTurn("user", "what is it")]) == ids[:first]
    assert [label for label in labels if label != IGNORE][-1] in encoder.end_ids
    assert tok.eos_token_id in encoder.end_ids
