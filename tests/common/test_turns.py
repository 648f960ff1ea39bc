"""One parser of turns: builder, index, sources and training read a conversation alike."""

from __future__ import annotations

import json
from typing import Any

import pytest

from onellm_dist.common.errors import SampleError
from onellm_dist.common.turns import ConversationTurn, TurnsError, has_pair, parse_turns
from onellm_dist.data.text_parts import read_turns
from onellm_dist.modalities import Part, all_modalities
from onellm_dist.shards.build.prepare import parse_meta
from onellm_dist.shards.format.index import count_text_bytes
from onellm_dist.shards.sources.readers.conversations import clean_turns

HUMAN, GPT = {"from": "human", "value": "what is it"}, {"from": "gpt", "value": "a cube"}

ACCEPTED: dict[str, list[Any]] = {
    "llava": [HUMAN, GPT],
    "system first": [{"from": "system", "value": "Be brief."}, HUMAN, GPT],
    "openai": [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "Ω"}],
    "mixed": [{"from": "User", "content": "q"}, {"role": "GPT", "value": "a"}],
    "sharegpt": [HUMAN, {"from": "chatgpt", "value": "a"}, HUMAN, {"from": "bing", "value": "b"}],
    "two answers": [HUMAN, GPT, GPT],
    "last question unanswered": [HUMAN, GPT, HUMAN],
    "both keys": [HUMAN | {"role": "user", "content": "what is it"}, GPT],
    "other fields": [HUMAN | {"weight": 3}, GPT],
}
REFUSED: dict[str, tuple[Any, str]] = {
    "mapping": ({"from": "gpt", "value": "a"}, "expected a list of turns, not dict"),
    "text": ("a cube", "expected a list of turns, not str"),
    "number": (3, "expected a list of turns, not int"),
    "no mapping in the list": ([HUMAN, "a cube"], "turn 1 is not"),
    "no value": ([{"from": "gpt"}], "turn 0 is not"),
    "no speaker": ([HUMAN, {"value": "a"}], "turn 1 is not"),
    "null speaker": ([HUMAN, {"from": None, "value": "a"}], "turn 1 is not"),
    "unknown speaker": ([{"from": "dog", "value": "woof"}, GPT], "turn 0 is not"),
    "value is a list": ([HUMAN, {"from": "gpt", "value": ["a"]}], "turn 1 is not"),
    "two speakers": ([{"from": "human", "role": "assistant", "value": "a"}], "of two speakers"),
    "two texts": ([{"from": "human", "value": "How?", "content": "Why?"}, GPT], "says two things"),
    "late system turn": ([HUMAN, GPT, {"from": "system", "value": "x"}], "turn 2 is a system turn"),
    "half a surrogate pair": ([HUMAN, {"from": "gpt", "value": "a\ud83d"}], "turn 1 is not valid"),
    "no answer": ([HUMAN], "the conversation has no answer"),
    "system alone": ([{"from": "system", "value": "x"}], "the conversation has no answer"),
}

PARTS: dict[str, tuple[Any, str]] = {
    "text": ([{"type": "text", "text": "what"}, {"type": "text", "text": " is it"}], "what is it"),
    "openai": (
        [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "q"}],
        "q",
    ),
    "url": ([{"type": "image", "url": "x.jpg"}, {"type": "text", "text": "q"}], "q"),
    "path": ([{"type": "video", "path": "x.mp4"}, {"type": "text", "text": "q"}], "q"),
    "arrow": (
        [
            {"type": "image", "text": None, "url": None},
            {"type": "text", "text": "q", "url": None},
        ],
        "q",
    ),
    "place of a medium": ([{"type": "image"}, {"type": "text", "text": "q"}], "q"),
}


def test_a_key_that_is_null_is_absent() -> None:
    """As in tables, whose turns have the keys of all."""
    turns = [
        {"from": None, "role": "user", "value": None, "content": "q"},
        {"from": "gpt", "role": None, "value": "a", "content": None},
    ]
    assert parse_turns(turns, all_modalities()) == [("user", "q", 1), ("assistant", "a", 1)]
    assert count_text_bytes(None, stored(turns)) == 2


@pytest.mark.parametrize(("content", "text"), PARTS.values(), ids=PARTS)
def test_content_parts_are_read(content: Any, text: str) -> None:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]
    assert parse_turns(turns, all_modalities())[0] == ConversationTurn("user", text)


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ({"role": "tool", "content": "4"}, "turn 1 calls a tool"),
        ({"from": "function_call", "value": "{}"}, "turn 1 calls a tool"),
        ({"role": "assistant", "content": "", "tool_calls": [{}]}, "turn 1 calls a tool"),
        ({"role": "user", "content": [{"type": "thinking", "thinking": "hm"}]}, "type 'thinking'"),
        ({"role": "user", "content": [{"type": "tool_use", "input": 1}]}, "type 'tool_use'"),
        ({"role": "user", "content": [{"type": "tool_use", "path": "x"}]}, "type 'tool_use'"),
        ({"role": "user", "content": [{"type": "tool_use"}]}, "type 'tool_use'"),
        ({"role": "user", "content": [{"type": "document", "path": "a.pdf"}]}, "type 'document'"),
        ({"role": "user", "content": [{"type": "file", "file": {"id": 1}}]}, "type 'file'"),
        ({"role": "user", "content": [{"type": ["image"], "url": "x"}]}, r"type \['image'\]"),
        ({"role": "user", "content": [{"type": "image", "text": "x"}]}, "type 'image'"),
        ({"role": "user", "content": [{"path": "x"}]}, "type None"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "turn 1 has weight 0.5"),
    ],
)
def test_what_cannot_be_read_exactly_is_refused_by_name(turn: Any, says: str) -> None:
    with pytest.raises(TurnsError, match=says):
        parse_turns([HUMAN, turn, GPT], all_modalities())


def test_weights_of_answers_are_kept() -> None:
    """A weight that is null is not given: a table has the key in every turn."""
    turns = parse_turns([HUMAN, GPT | {"weight": 0}, GPT | {"weight": None}, GPT], all_modalities())
    assert [turn.weight for turn in turns] == [1, 0, 1, 1]


def stored(turns: Any) -> bytes:
    return json.dumps({"conversations": turns}).encode()


@pytest.mark.parametrize("turns", ACCEPTED.values(), ids=ACCEPTED)
def test_a_good_conversation_is_accepted_everywhere(turns: list[Any]) -> None:
    parsed = parse_turns(turns, all_modalities())
    assert [turn.text for turn in parsed] == [t.get("value", t.get("content")) for t in turns]
    assert read_turns({"json": Part("json", stored(turns))}) == parsed
    assert parse_meta(stored(turns))["conversations"] == turns
    assert count_text_bytes(None, stored(turns)) == sum(len(turn.text.encode()) for turn in parsed)
    assert clean_turns(turns)


@pytest.mark.parametrize(("turns", "says"), REFUSED.values(), ids=REFUSED)
def test_a_bad_conversation_is_refused_everywhere_with_one_message(turns: Any, says: str) -> None:
    with pytest.raises(TurnsError, match=says) as info:
        parse_turns(turns, all_modalities())
    message = str(info.value)
    with pytest.raises(SampleError) as training:
        read_turns({"json": Part("json", stored(turns))})
    with pytest.raises(SampleError) as building:
        parse_meta(stored(turns))
    assert building.value.what == f"malformed conversations: {message}"
    assert training.value.what == building.value.what
    assert count_text_bytes(None, stored(turns)) == 0
    with pytest.raises(TurnsError) as source:
        clean_turns(turns)
    assert str(source.value) == message


def test_roles_are_those_of_chat_templates() -> None:
    assert parse_turns([{"from": "system", "value": "s"}, HUMAN, GPT], all_modalities()) == [
        ConversationTurn("system", "s"),
        ConversationTurn("user", "what is it"),
        ConversationTurn("assistant", "a cube"),
    ]


def test_sources_also_drop_what_no_question_precedes_or_no_answer_follows() -> None:
    assert clean_turns([GPT, HUMAN, GPT, HUMAN]) == [HUMAN, GPT]
    with pytest.raises(TurnsError, match="no answer to a question"):
        clean_turns([GPT])
    with pytest.raises(TurnsError, match="turn 1 is an empty answer"):
        clean_turns([HUMAN, {"from": "gpt", "value": " "}])


def test_an_empty_list_of_turns_is_no_conversation() -> None:
    assert parse_meta(b'{"caption": "a", "conversations": []}') == {
        "caption": "a",
        "conversations": [],
    }
    with pytest.raises(SampleError, match="no `conversations`"):
        read_turns({"json": Part("json", stored([]))})


@pytest.mark.parametrize(
    "more",
    [
        {"chosen": [HUMAN, GPT], "rejected": [HUMAN, {**GPT, "value": "so"}]},
        {"chosen": GPT, "rejected": {**GPT, "value": "so"}},
        {"chosen": "a cube", "rejected": "so"},
        {"chosen": 8.5, "rejected": 3.0},
    ],
    ids=["conversations", "turns", "texts", "numbers"],
)
def test_a_conversation_that_is_answered_is_no_pair(more: dict[str, Any]) -> None:
    """Tables of preferences have the chosen conversation under `messages` too."""
    plain = {"messages": [HUMAN, GPT]}
    both = {**plain, **more}
    assert not has_pair(both)
    parse_meta(json.dumps(both).encode())
    found, expected = (
        (count_text_bytes(None, data), read_turns({"json": Part("json", data)}))
        for data in (json.dumps(meta).encode() for meta in (both, plain))
    )
    assert found == expected


def test_a_question_and_two_answers_are_a_pair() -> None:
    asked = {"messages": [HUMAN, GPT, HUMAN], "chosen": GPT, "rejected": [GPT]}
    assert has_pair(asked)
    assert not has_pair({**asked, "rejected": []})
    assert not has_pair({**asked, "messages": "what is it"})
    assert not has_pair({**asked, "messages": [HUMAN, "what is it"]})
