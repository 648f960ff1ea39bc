"""Conversations in the LLM's own chat template: its exact ids, its answers and nothing else."""

from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from data_worlds import tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from onellm_dist.common.chat_template import ChatTemplate
from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.turns import ConversationTurn
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
PHI3 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|im_start|>user\n' + m['content'] + "
    "'<|im_end|>\n' }}{% elif m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' + "
    "m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% else %}{{ eos_token }}{% endif %}"
)
"""Writes EOS behind a conversation that does not continue."""
QWEN3 = (
    "{% for m in messages %}{% set content = m['content'] %}{% set thoughts = '' %}"
    "{% if '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and (loop.last or thoughts) %}"
    "{{ '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' + content }}"
    "{% else %}{{ content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""As Qwen3: an empty thought before the last answer and, without thinking, in the prompt."""
R1 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}"
    "{{ m['content'].split('</think>')[-1] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<think>\n' }}{% endif %}"
)
"""Opens an answer with a thought in the prompt, and drops thoughts from conversations."""
DATED = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
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
        (
            THINKS,
            "prompt and the answer in turn 1 its chat template writes '<think></think>'",
        ),
        (ENDLESS, "nothing after the answer in turn 1"),
        (None, "has no chat template"),
    ],
    ids=["thinks", "endless", "none"],
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


def marked(answer: str, *, before: str = "", behind: str = "") -> str:
    """A ChatML template whose marks hold `answer`; `before` and `behind` stand outside of them."""
    return (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        + before
        + "{% generation %}"
        + answer
        + "{% endgeneration %}"
        + behind
        + "{% else %}<|im_start|>user\n{{ m['content'] }}<|im_end|>{{ '\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


OPEN, TEXT, END = "<|im_start|>assistant\n", "{{ m['content'] }}", "<|im_end|>"


@pytest.mark.parametrize(
    "template",
    [
        marked(TEXT + END, before=OPEN, behind="{{ '\n' }}"),
        marked(TEXT + END + "{{ '\n' }}", before=OPEN),
        marked(OPEN + TEXT + END, behind="{{ '\n' }}"),
        marked(OPEN + TEXT + END + "{{ '\n' }}"),
    ],
    ids=["right", "newline inside", "header inside", "both inside"],
)
def test_marks_are_held_against_prompt_and_end(template: str) -> None:
    tok = chatty(template)
    encoder, plain = TextEncoder(tok, "chat", 2018), TextEncoder(chatty(CHATML), "chat", 2018)
    labels = encoder.encode(talk(*VALUES))[1]
    assert supervised(tok, labels) == [f"{answer}<|im_end|>" for answer in VALUES[1::2]]
    assert labels == plain.encode(talk(*VALUES))[1]
    assert encoder.end_ids == sorted({2, tok.convert_tokens_to_ids("<|im_end|>")})
    assert encoder.end_text is None


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (marked(TEXT, before=OPEN, behind=END), "does not mark what ends the answer"),
        (marked(TEXT + END, before=OPEN + "Well: "), "writes 'Well:'"),
        (
            "{% for m in messages %}{{ m['content'] }}{% if loop.last %}{% generation %}</s>"
            "{% endgeneration %}{% endif %}{% endfor %}",
            "marks 1 of 2 answers",
        ),
    ],
    ids=["end outside", "words before", "too few"],
)
def test_marks_that_contradict_generation_are_refused(template: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        TextEncoder(chatty(template), "chat", 2018)


def test_marks_in_the_right_place_keep_their_fingerprint() -> None:
    """What was encoded rightly before keeps its token counts."""
    assert ChatTemplate(chatty(CHATML_MARKED)).identity == ()
    assert ChatTemplate(chatty(CHATML)).identity == ()
    assert ChatTemplate(chatty(marked(OPEN + TEXT + END))).identity == ("marks",)


def test_an_end_of_words_is_a_stop_string() -> None:
    worded = ENDLESS.replace("{{ m['content'] }}", "{{ m['content'] }} [over]")
    encoder = TextEncoder(chatty(worded), "chat", 2018)
    assert encoder.end_text == "[over]"
    assert encoder.end_ids == [encoder.eos]


def test_a_template_that_closes_the_conversation_ends_answers_as_turns_end() -> None:
    tok = chatty(PHI3)
    encoder = TextEncoder(tok, "chat", 2018)
    for values in (VALUES, VALUES[:2]):
        ids, labels = encoder.encode(talk(*values))
        assert supervised(tok, labels) == [f"{answer}<|im_end|>" for answer in values[1::2]]
        assert ids[-1] == tok.eos_token_id and labels[-1] == IGNORE
    prompt = encoder.encode_prompt([ConversationTurn("user", VALUES[0])])
    assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("answer", "written"),
    [
        ("a red cube", "a red cube<|im_end|>"),
        ("<think>red</think>a red cube", "<think>\nred\n</think>\n\na red cube<|im_end|>"),
    ],
    ids=["no thoughts", "thoughts"],
)
def test_a_thinking_template_is_read_where_the_prompt_leads_to_the_answer(
    answer: str, written: str, caplog: pytest.LogCaptureFixture
) -> None:
    template = ChatTemplate(chatty(QWEN3))
    assert "conversations of one answer alone" in caplog.text
    turns = [ConversationTurn("user", "what is it"), ConversationTurn("assistant", answer)]
    text, ((start, end),) = template.render(turns)
    assert text[start:end] == written
    if "think" in answer:
        return
    assert text[:start] == template.render_prompt(turns[:1])
    with pytest.raises(SampleError, match="changes the turns before"):
        template.render([*turns, ConversationTurn("user", "sure"), turns[1]])


def test_a_template_whose_prompt_opens_a_thought_is_refused() -> None:
    with pytest.raises(UsageError, match=r"with '<think>\\n' in the prompt"):
        TextEncoder(chatty(R1), "chat", 2018)


def test_todays_date_does_not_reach_the_ids() -> None:
    tok = chatty(DATED)
    encoder = TextEncoder(tok, "chat", 2018)
    assert "26 Jul 2024" in ChatTemplate(tok).render_prompt([ConversationTurn("user", "hm")])
    assert "26 Jul 2024" in ChatTemplate(tok).source  # and so in the fingerprint
    with pytest.raises(UsageError, match="date in a computed form"):
        ChatTemplate(chatty(DATED.replace("'%d %b %Y'", "'%d' + ''")))
    assert pickle.loads(pickle.dumps(encoder)).encode(talk(*VALUES)) == encoder.encode(
        talk(*VALUES)
    )


@pytest.mark.parametrize("text_format", ["chat", "conversation"])
def test_an_answer_of_weight_0_is_context(text_format: Any) -> None:
    tok = chatty(CHATML)
    encoder = TextEncoder(tok, text_format, 2018)
    messages = [dict(message) for message in MESSAGES]
    messages[1]["weight"], messages[3]["weight"] = 0, 1  # type: ignore[assignment]

    def encode() -> tuple[list[int], list[int]]:
        return encoder.encode({"json": Part("json", json.dumps({"messages": messages}).encode())})

    ids, labels = encode()
    assert ids == encoder.encode(talk(*VALUES))[0]
    assert len(supervised(tok, labels)) == 2
    for message in messages[1::2]:
        message["weight"] = 0  # type: ignore[assignment]
    with pytest.raises(SampleError, match="weight 0"):
        encode()


def test_a_tokenizer_without_bos_begins_texts_as_pretraining_did() -> None:
    tok = chatty(CHATML)
    tok.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    start = tok.convert_tokens_to_ids("<|endoftext|>")
    tok.bos_token = None
    for text_format in ("caption", "conversation", "chat"):
        ids, labels = TextEncoder(tok, text_format, 2018).encode(
            {**talk(*VALUES), "txt": Part("txt", b"a cube")}
        )
        assert ids[0] == start and labels[0] == IGNORE
