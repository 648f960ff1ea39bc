"""The source preferences: columns that each say a part of a row, agree, or contradict each other.

All rows are read as JSON has them, and as a parquet table has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq
from shard_worlds import write_tree
from source_checks import build_source, make_photo, read_samples

from onellm_dist.common.turns import TurnsError, get_role, get_said
from onellm_dist.shards.build.task import TooManyFailuresError
from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers.preference_rows import split_row

Row = dict[str, Any]


def ask(content: Any) -> Row:
    return {"role": "user", "content": content}


def say(text: str) -> Row:
    return {"role": "assistant", "content": text}


def be(text: str) -> Row:
    return {"role": "system", "content": text}


def show(path: str | None, text: str = "Why?") -> Row:
    """A question about a picture, whose keys are those of a table."""
    image = {"type": "image", "image": path, "text": None}
    return ask([image, {"type": "text", "text": text, "image": None}])


WHY, WHO, ME = ask("Why?"), ask("Who?"), say("me")
BECAUSE, SO = say("because"), say("so")
TEXTS = {"chosen": "because", "rejected": "so"}
OUTPUTS = {"output_1": "so", "output_2": "because", "preference": 2}
RLHF_V = {"text": json.dumps({"question": "Why?", **TEXTS})}


def end(*turns: Row) -> Row:
    """Two whole conversations that begin with some turns."""
    return {"chosen": [*turns, BECAUSE], "rejected": [*turns, SO]}


def to_parts(value: Any) -> Any:
    """Turns as a table has them, in which all content is a list of parts if some is."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return value
    return [
        {**turn, "content": [{"type": "text", "text": turn["content"], "image": None}]}
        if isinstance(turn.get("content"), str)
        else turn
        for turn in value
    ]


def as_table(rows: list[Row]) -> list[Row]:
    columns = dict.fromkeys(key for row in rows for key in row)
    rows = [{**columns, **row} for row in rows]
    if not any('"type"' in json.dumps(row) for row in rows):
        return rows
    return [{key: to_parts(value) for key, value in row.items()} for row in rows]


def through_table(row: Row, path: Path) -> Row:
    pq.write_table(pa.Table.from_pylist(as_table([row])), path)
    (read,) = pq.read_table(path).to_pylist()
    return dict(read)


JOINED: dict[str, tuple[Row, list[Row]]] = {
    # what either answer follows
    "an answer at the end": ({"conversations": [WHY, BECAUSE], **TEXTS}, [WHY]),
    "an answer at the end of one": (
        {"conversations": [WHY, BECAUSE], "messages": [WHY], **TEXTS},
        [WHY],
    ),
    "the other answer": ({"messages": [WHY, SO], "question": "Why?", **TEXTS}, [WHY]),
    "a beginning": (
        {"conversations": [WHO, ME, WHY], "messages": [WHO, ME], **TEXTS},
        [WHO, ME, WHY],
    ),
    "a beginning that comes again": (
        {
            "conversations": [ask("hi"), say("a"), ask("hi"), say("b"), WHY],
            "messages": [ask("hi"), say("a"), ask("hi")],
            **TEXTS,
        },
        [ask("hi"), say("a"), ask("hi"), say("b"), WHY],
    ),
    "history of whole conversations": ({**end(WHY), "history": [["Who?", "me"]]}, [WHO, ME, WHY]),
    "history that they have": ({**end(WHO, ME, WHY), "history": [["Who?", "me"]]}, [WHO, ME, WHY]),
    "history of outputs": (
        {"conversations": [WHY, ME], **OUTPUTS, "history": [["Who?", "me"]]},
        [WHO, ME, WHY],
    ),
    "history with the same answer": (
        {"prompt": "Why?", "history": [["Who?", "because"]], **TEXTS},
        [WHO, BECAUSE, WHY],
    ),
    "history behind a system turn": (
        {"prompt": [be("S"), WHY], "history": [["Who?", "me"]], **TEXTS},
        [be("S"), WHO, ME, WHY],
    ),
    "the same system turn": (
        {"conversations": [be("Be brief."), WHY], "system": "Be brief.\n", **TEXTS},
        [be("Be brief."), WHY],
    ),
    "the same pair twice": (
        {"messages": [WHY, BECAUSE], "rejected_response": "so", **TEXTS},
        [WHY],
    ),
    "the same pair thrice": (
        {
            "messages": [WHY, BECAUSE],
            "rejected_response": "so",
            "rejected_messages": [WHY, SO],
            **end(WHY),
        },
        [WHY],
    ),
    "the same outputs": ({"conversations": [WHY, ME], **OUTPUTS, **TEXTS}, [WHY]),
    "the same text": ({**RLHF_V, "question": "Why?", **TEXTS}, [WHY]),
    "the same pair with weights": (
        {
            "messages": [WHY, {**BECAUSE, "weight": 1}],
            "rejected_response": "so",
            "chosen": [{**BECAUSE, "weight": None}],
            "rejected": "so",
        },
        [WHY],
    ),
    "weights of what is asked": (
        {
            "messages": [WHO, {**ME, "weight": 0}, WHY],
            **end(WHO, {**ME, "weight": 1}, WHY),
        },
        [WHO, ME, WHY],
    ),
    "numbers": ({"instruction": "Count", "input": 0, **TEXTS}, [ask("Count\n0")]),
    "point": ({"conversations": [ask("<point>\nWhy?")], "question": "Why?", **TEXTS}, []),
    "alias": ({"conversations": [ask("<Video></Video>\nWhy?")], "prompt": "Why?", **TEXTS}, []),
    "tag and part": (
        {"conversations": [ask("<image>\nWhy?")], "prompt": [show("a.jpg")], **TEXTS},
        [show("a.jpg")],
    ),
    "text and part": ({"question": "Why?", "prompt": [show("a.jpg")], **TEXTS}, [show("a.jpg")]),
    "text and tag": ({"question": "Why?", "instruction": "<image> Why?", **TEXTS}, []),
    "place and medium": (
        {"conversations": [show(None)], "messages": [show("a.jpg")], **TEXTS},
        [show("a.jpg")],
    ),
    "tag and part of whole conversations": (
        {
            "chosen": [ask([{"type": "text", "text": "<image>\nWhy?"}]), BECAUSE],
            "rejected": [show("a.jpg"), SO],
        },
        [show("a.jpg")],
    ),
    "ms-swift beside a system turn": (
        {"conversations": [be("S")], "messages": [WHY, BECAUSE], "rejected_response": "so"},
        [be("S"), WHY],
    ),
    "ms-swift beside the question": (
        {"conversations": [WHY], "messages": [WHY, BECAUSE], "rejected_response": "so"},
        [WHY],
    ),
}


@pytest.mark.parametrize("name", JOINED)
def test_columns_that_agree_are_joined(name: str, tmp_path: Path) -> None:
    row, expected = JOINED[name]
    for one in (row, through_table(row, tmp_path / "t.parquet")):
        shared, chosen, rejected = split_row(one)
        kept = expected or next(row[k] for k in ("conversations", "instruction") if k in row)
        kept = [ask(kept)] if isinstance(kept, str) else kept
        assert list(map(simplify, shared)) == list(map(simplify, kept))
        assert [simplify(turns[0]) for turns in (chosen, rejected)] == [
            simplify(turn) for turn in (BECAUSE, SO)
        ]


def simplify(turn: Row) -> Any:
    """Role and parts, without keys that are null."""
    said = get_said(turn)
    parts = said if isinstance(said, list) else [{"type": "text", "text": said}]
    return get_role(turn), [{k: v for k, v in p.items() if v is not None} for p in parts]


REFUSED: dict[str, tuple[Row, str]] = {
    "another question": (
        {"conversations": [WHY, BECAUSE], "question": "How?", **TEXTS},
        "question ends with user: 'How\\?', and conversations ends with user: 'Why\\?'",
    ),
    "another answer": (
        {"conversations": [WHO, ME, WHY], "messages": [WHO, say("you")], **TEXTS},
        "messages has assistant: 'you' where conversations has assistant: 'me'",
    ),
    "another answer before": (
        {"conversations": [WHO, ME], "messages": [WHO, say("you"), WHY], **TEXTS},
        "messages has assistant: 'you' where conversations has assistant: 'me'",
    ),
    "another answer later": (
        {"conversations": [WHO, ME, WHY], "messages": [ask("x"), ME, WHO, SO, WHY], **TEXTS},
        "messages has assistant: 'so' where conversations has assistant: 'me'",
    ),
    "another answer of whole conversations": (
        {**end(WHO, ME, WHY), "prompt": [WHO, say("you")]},
        "prompt has assistant: 'you' where both answers' conversations have assistant: 'me'",
    ),
    "a question that comes again": (
        {**end(ask("hi"), say("a"), ask("hi")), "prompt": [ask("hi"), say("b"), ask("hi")]},
        "prompt has assistant: 'b' where both answers' conversations have assistant: 'a'",
    ),
    "one of several places": (
        {
            "conversations": [ask("x"), ME, ask("hi"), say("a"), ask("hi")],
            "messages": [ask("hi"), say("a"), ask("hi"), say("b"), WHY],
            **TEXTS,
        },
        "messages has assistant: 'b' where conversations has assistant: 'a'",
    ),
    "a picture in one of several places": (
        {
            "conversations": [ask("Why?"), ME, ask("Why?")],
            "prompt": [show("a.jpg")],
            **TEXTS,
        },
        "in several places",
    ),
    "history": ({**end(WHY), "history": "x"}, "history is not a list of pairs of texts: 'x'"),
    "another system turn": (
        {"conversations": [be("Be brief."), WHY], "system": "Be long.", **TEXTS},
        "column system is 'Be long.', .* begins with system: 'Be brief.'",
    ),
    "another system turn of whole conversations": (
        {**end(be("Be brief."), WHY), "system": "Be long."},
        "column system is 'Be long.', .* begins with system: 'Be brief.'",
    ),
    "system turns of two columns": (
        {"conversations": [be("Be brief."), WHY], "prompt": [be("Be long."), WHY], **TEXTS},
        "prompt has system: 'Be long.' where conversations has system: 'Be brief.'",
    ),
    "a system of another type": ({"prompt": "Why?", "system": ["x"], **TEXTS}, "system is \\['x'"),
    "another pair": (
        {"messages": [WHY, BECAUSE], "rejected_response": "no", **TEXTS},
        "the rejected one of .* is assistant: 'so', .*rejected_response is assistant: 'no'",
    ),
    "another rejected_messages": (
        {"messages": [WHY, BECAUSE], "rejected_messages": [WHY, ME], "rejected_response": "so"},
        "rejected_messages is assistant: 'me', that of .*rejected_response is assistant: 'so'",
    ),
    "other outputs": (
        {"conversations": [WHY], **TEXTS, **OUTPUTS, "preference": 1},
        "chosen and rejected is assistant: 'because', that of output_1 and output_2 .* 'so'",
    ),
    "another text": (
        {"question": "Why?", "chosen": "x", "rejected": "so", **RLHF_V},
        "that of text is assistant: 'because'",
    ),
    "another text's question": ({"question": "How?", **TEXTS, **RLHF_V}, "text ends with user"),
    "another weight": (
        {
            "messages": [WHY, BECAUSE],
            "chosen": [{**BECAUSE, "weight": 0}],
            "rejected": "so",
            "rejected_response": "so",
        },
        "the chosen one of messages and rejected is assistant: 'because', that of chosen "
        "and rejected is assistant: 'because' \\(weight 0\\)",
    ),
    "another weight of a later answer": (
        {
            **TEXTS,
            "messages": [WHY, SO, WHO, ME],
            "chosen": [BECAUSE],
            "rejected": [SO, WHO, {**ME, "weight": 0}],
        },
        "messages has assistant: 'me' where the answer is assistant: 'me' \\(weight 0\\)",
    ),
    "another weight at the end": (
        {"conversations": [WHY, {**BECAUSE, "weight": 0}], **TEXTS},
        "conversations has assistant: 'because' \\(weight 0\\) where the answer is",
    ),
    "an answer alone": ({"question": "Why?", "chosen": "x", **OUTPUTS}, "chosen stands alone"),
    "an empty answer": ({"question": "Why?", "chosen": "x", "rejected": ""}, "one of them is emp"),
    "an instruction of another type": ({"instruction": ["Why?"], **TEXTS}, "instruction is \\['W"),
    "an input alone": ({"input": "Why?", "question": "How?", **TEXTS}, "prompt: input ends with"),
    "two speakers": (
        {"messages": [{**WHY, "from": "gpt"}], **TEXTS},
        "two speakers, 'gpt' and 'user'",
    ),
    "two texts of a turn that is not kept": (
        {"conversations": [WHY], "prompt": [{**WHY, "value": "How?"}], **TEXTS},
        "says two things, 'How\\?' and 'Why\\?'",
    ),
    "another picture": (
        {"conversations": [show("a.jpg")], "prompt": [show("b.jpg")], **TEXTS},
        "\\(b.jpg\\), and conversations ends with user: '<image>Why\\?' \\(a.jpg\\)",
    ),
    "another picture of either": (
        {"chosen": [show("a.jpg"), BECAUSE], "rejected": [show("b.jpg"), SO]},
        "begin with different turns: .* \\(a.jpg\\), and .* \\(b.jpg\\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_columns_that_contradict_each_other_are_refused(name: str, tmp_path: Path) -> None:
    row, message = REFUSED[name]
    for one in (row, through_table(row, tmp_path / "t.parquet")):
        with pytest.raises((BadSampleError, TurnsError), match=message):
            split_row(one)


def test_media_behind_the_shared_turns_are_those_of_both(tmp_path: Path) -> None:
    later = [show("2.jpg", "And this?"), say("a dog")]
    first = {"conversations": [show("1.jpg")]}
    same = {"chosen": [BECAUSE, *later], "rejected": [SO, *later]}
    rows: list[Row] = [
        {**first, **same},
        {**first, **same, "rejected": [SO, show("1.jpg", "And this?"), say("a dog")]},
        {**first, **same, "rejected": [SO]},
        {**first, **same, "images": ["1.jpg"]},
    ]
    files: dict[str, bytes | str] = {f"{n}.jpg": make_photo(seed=n) for n in (1, 2)}
    inputs = write_tree(tmp_path / "in", {**files, "rows.json": json.dumps(rows)})
    pq.write_table(pa.Table.from_pylist(as_table(rows)), inputs / "rows.parquet")
    for name in ("rows.json", "rows.parquet"):
        report, dataset = build_source(
            "preferences", inputs / name, tmp_path / name, modality="image", max_failures=0.9
        )
        (sample,) = read_samples(dataset).values()
        assert [sample[f"{n}.jpg"] for n in (0, 1)] == [files["1.jpg"], files["2.jpg"]]
        assert sample["json"]["rejected"][1]["value"] == "<image>And this?"
        reasons = [q.reason for q in report.quarantined]
        assert "chosen has image 2.jpg, and rejected image 1.jpg" in reasons[0]
        assert "chosen has image 2.jpg, and rejected no medium" in reasons[1]
        assert "media of two places: image" in reasons[2]
        with pytest.raises(TooManyFailuresError, match="the row has image"):
            build_source("preferences", inputs / name, tmp_path / f"text_{name}")
