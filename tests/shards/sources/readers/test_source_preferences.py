"""The source preferences: rows of all forms become the same samples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from listed_rows import write_parquet
from shard_worlds import write_tree
from source_checks import build_source, make_photo, make_turns, read_samples

from onellm_dist.modalities import Part
from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers.preference_rows import split_row
from onellm_dist.shards.tools.preview_samples import format_text

QUESTION = {"from": "human", "value": "Why?"}
GOOD, BAD = {"from": "gpt", "value": "because"}, {"from": "gpt", "value": "so"}
STORED = ([QUESTION], [GOOD], [BAD])


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ASKED = message("user", "Why?")
FORMS: dict[str, dict[str, Any]] = {
    "ours": {"conversations": [QUESTION], "chosen": [GOOD], "rejected": [BAD]},
    "llama_factory": {"conversations": [QUESTION], "chosen": GOOD, "rejected": BAD},
    "trl": {
        "prompt": [ASKED],
        "chosen": [message("assistant", "because")],
        "rejected": [message("assistant", "so")],
    },
    "trl_text": {"prompt": "Why?", "chosen": "because", "rejected": "so"},
    "trl_implicit": {
        "chosen": [ASKED, message("assistant", "because")],
        "rejected": [ASKED, message("assistant", "so")],
    },
    "ms_swift": {
        "messages": [ASKED, message("assistant", "because")],
        "rejected_response": "so",
    },
    "ms_swift_messages": {
        "messages": [ASKED, message("assistant", "because")],
        "rejected_messages": [ASKED, message("assistant", "so")],
    },
    "llava_rlhf": {
        "conversations": [QUESTION, {"from": "gpt", "value": "an answer that neither is"}],
        "output_1": {"from": "llava", "value": "so"},
        "output_2": {"from": "llava", "value": "because"},
        "preference": 2,
    },
    "llava_rlhf_first": {
        "conversations": [QUESTION],
        "output_1": {"from": "llava", "value": "because"},
        "output_2": {"from": "llava", "value": "so"},
        "preference": 1,
    },
    "rlaif_v": {"question": "Why?", "chosen": "because", "rejected": "so"},
    "rlhf_v": {"text": json.dumps({"question": "Why?", "chosen": "because", "rejected": "so"})},
    "alpaca": {"instruction": "Why?", "input": "", "chosen": "because", "rejected": "so"},
    "ultrafeedback": {
        "prompt": "Why?",
        "messages": [ASKED, message("assistant", "because")],
        "chosen": [{**ASKED, "name": None}, message("assistant", "because")],
        "rejected": [QUESTION, BAD],
        "score_chosen": 8.0,
    },
    "white_space": {"question": " Why?\n", "chosen": " because", "rejected": "so "},
}


def test_rows_of_all_forms_give_the_same_sample(tmp_path: Path) -> None:
    rows = list(FORMS.values())
    inputs = write_tree(tmp_path / "in", {"rows.jsonl": "\n".join(map(json.dumps, rows))})
    report, dataset = build_source("preferences", inputs, tmp_path / "out")
    samples = read_samples(dataset)
    assert len(samples) == len(rows) and not report.quarantined and dataset.modalities == ()
    for sample in samples.values():
        found = sample["json"]
        assert (found["conversations"], found["chosen"], found["rejected"]) == STORED


def test_media_stand_where_the_prompt_says(tmp_path: Path) -> None:
    turns = make_turns("Which? <image>", "this", "Why?", "because")
    rows = [
        {
            "id": "a",
            "image": "1.jpg",
            "conversations": turns[:3],
            "chosen": turns[3],
            "rejected": BAD,
        },
        {"id": "b", "image": "none.jpg", **FORMS["ours"]},
        {"id": "c", "image": "1.jpg", **FORMS["ours"], "rejected": [GOOD]},
        {"id": "d", "image": "1.jpg", **FORMS["ours"], "chosen": [{**GOOD, "value": " "}]},
        {"id": "e", "image": "1.jpg", "conversations": turns[:3]},
        {"id": "f", "image": "1.jpg", **FORMS["llava_rlhf"], "preference": 0},
    ]
    files: dict[str, bytes | str] = {"rows.json": json.dumps(rows), "1.jpg": make_photo(seed=1)}
    inputs = write_tree(tmp_path / "in", files)
    report, dataset = build_source(
        "preferences", inputs / "rows.json", tmp_path / "out", modality="image", max_failures=0.9
    )
    (sample,) = read_samples(dataset).values()
    assert sample["0.jpg"] == make_photo(seed=1)
    assert sample["json"]["conversations"][0]["value"] == "Which? <image>"
    assert sample["json"]["chosen"] == [turns[3]] and dataset.lists_media
    reasons = [q.reason for q in report.quarantined]
    assert reasons == [
        "missing file: none.jpg",
        "answers: chosen and rejected are the same",
        "answers: one of them is empty",
        "unreadable row: it has no chosen and rejected answer",
        "unreadable row: preference is 0, neither 1 nor 2",
    ]


def test_a_row_with_media_is_no_text(tmp_path: Path) -> None:
    rows = [FORMS["ours"], {**FORMS["ours"], "image": "1.jpg"}]
    inputs = write_tree(tmp_path / "in", {"rows.json": json.dumps(rows)})
    report, _ = build_source("preferences", inputs, tmp_path / "out", max_failures=0.9)
    assert "-o modality=image" in report.quarantined[0].reason


@pytest.mark.parametrize("name", FORMS)
def test_a_row_is_split(name: str) -> None:
    shared, chosen, rejected = split_row(FORMS[name])
    texts = [
        [str(t.get("value", t.get("content"))) for t in turns]
        for turns in (shared, chosen, rejected)
    ]
    assert [[text.strip() for text in one] for one in texts] == [["Why?"], ["because"], ["so"]]


SYSTEM = message("system", "Be brief.")


@pytest.mark.parametrize("name", ["ours", "trl_implicit", "ms_swift", "llava_rlhf", "alpaca"])
def test_the_column_system_is_the_system_turn(name: str) -> None:
    shared, *_ = split_row({**FORMS[name], "system": "Be brief."})
    assert shared[0] == SYSTEM and len(shared) == 2
    shared, *_ = split_row({**FORMS[name], "system": " "})
    assert len(shared) == 1


def test_a_system_turn_of_the_prompt_stays() -> None:
    """The column may repeat it; another text there is refused (test_preference_prompts.py)."""
    row = {**FORMS["ours"], "conversations": [SYSTEM, QUESTION], "system": " Be brief."}
    assert split_row(row)[0] == [SYSTEM, QUESTION]


ANSWER = message("assistant", "me")
EARLIER = [SYSTEM, message("user", "Who?"), ANSWER]
WHOLE = FORMS["trl_implicit"]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ({}, [ASKED]),
        ({"prompt": "  "}, [ASKED]),
        ({"prompt": "Why? "}, [ASKED]),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]}, [ASKED]),
        ({"prompt": [SYSTEM, ASKED]}, [SYSTEM, ASKED]),
        ({"conversations": EARLIER}, [*EARLIER, ASKED]),
        ({"conversations": [*EARLIER, QUESTION]}, [*EARLIER, ASKED]),
        ({"messages": [SYSTEM]}, [SYSTEM, ASKED]),
        ({"messages": [*EARLIER, ASKED, GOOD], "prompt": "Why?"}, [*EARLIER, ASKED]),
        ({"prompt": [SYSTEM, ASKED], "messages": [ASKED, BAD]}, [SYSTEM, ASKED]),
    ],
)
def test_nothing_of_the_prompt_beside_whole_conversations_is_lost(
    prompt: dict[str, Any], expected: list[dict[str, str]]
) -> None:
    shared, *answers = split_row({**WHOLE, **prompt})
    assert [(t.get("role", "user"), t.get("content", "Why?")) for t in shared] == [
        (t["role"], t["content"]) for t in expected
    ]
    assert [turns[0]["content"] for turns in answers] == ["because", "so"]


def test_the_prompt_may_be_any_part_of_longer_shared_turns() -> None:
    shared = [*EARLIER, ASKED]
    whole = {key: [*shared, *WHOLE[key][1:]] for key in ("chosen", "rejected")}
    for prompt in ("Who?", "Why?", shared[:2], shared[2:]):
        assert split_row({**whole, "prompt": prompt})[0] == shared


SHOWN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}
TAGGED = message("user", "<image>\nWhy?")


@pytest.mark.parametrize("asked", [SHOWN, TAGGED])
def test_a_text_is_that_of_the_same_turn_with_media(asked: dict[str, Any]) -> None:
    whole = {key: [SYSTEM, asked, *WHOLE[key][1:]] for key in ("chosen", "rejected")}
    assert split_row({**whole, "prompt": "Why?"})[0] == [SYSTEM, asked]
    row = {**FORMS["rlaif_v"], "conversations": [asked]}
    assert split_row(row)[0] == [asked]
    with pytest.raises(BadSampleError, match="prompt: prompt ends with user"):
        split_row({**WHOLE, "prompt": [asked]})


OTHER = message("user", "Who?")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"messages": [SYSTEM], "prompt": "Why?"}, [SYSTEM, ASKED]),
        ({"conversations": [ASKED], "messages": [SYSTEM]}, [SYSTEM, ASKED]),
        ({"conversations": EARLIER, "question": "Why?"}, [*EARLIER, ASKED]),
        ({"conversations": [ASKED], "messages": EARLIER}, [*EARLIER, ASKED]),
        ({"conversations": [*EARLIER, ASKED], "question": "Why? "}, [*EARLIER, ASKED]),
        ({"conversations": [*EARLIER, ASKED], "question": "Who?"}, [*EARLIER, ASKED]),
        ({"conversations": [ASKED], "prompt": [*EARLIER, ASKED]}, [*EARLIER, ASKED]),
        ({"conversations": EARLIER, "messages": [*EARLIER[1:], ASKED]}, [*EARLIER, ASKED]),
        ({"conversations": [ASKED], "messages": [ASKED, GOOD]}, [ASKED]),
        ({"conversations": [SYSTEM], "messages": EARLIER[1:], "prompt": "Why?"}, [*EARLIER, ASKED]),
        ({"prompt": "Why?", "instruction": "Why?"}, [ASKED]),
        ({"messages": [SYSTEM], "instruction": "Why?"}, [SYSTEM, ASKED]),
        ({"prompt": "Why?", "history": [["Who?", "me"]]}, [*EARLIER[1:], ASKED]),
    ],
)
def test_nothing_of_several_columns_of_the_prompt_is_lost(
    columns: dict[str, Any], expected: list[dict[str, str]]
) -> None:
    assert split_row({**columns, "chosen": "because", "rejected": "so"})[0] == expected


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"conversations": [ASKED, ANSWER, OTHER], "question": "How?"},
            "question ends with user: 'How\\?', and conversations ends with user: 'Who\\?'",
        ),
        ({"conversations": [ASKED], "question": "How?"}, "conversations ends with user: 'Why"),
        ({"prompt": "Why?", "instruction": "How?"}, "instruction .*, and prompt ends with"),
        ({"conversations": [ASKED], "messages": [ASKED, ANSWER]}, "messages .* assistant: 'me'"),
        ({"conversations": [ASKED, ANSWER], "messages": [OTHER, ANSWER]}, "messages ends with"),
    ],
)
@pytest.mark.parametrize("form", ["rlaif_v", "llava_rlhf"])
def test_columns_of_the_prompt_that_ask_different_things_are_refused(
    form: str, columns: dict[str, Any], message: str
) -> None:
    answers = {k: v for k, v in FORMS[form].items() if k not in ("conversations", "question")}
    with pytest.raises(BadSampleError, match=message):
        split_row({**answers, **columns})


def test_a_question_beside_an_answered_conversation_is_of_it() -> None:
    for form in ("ms_swift", "ms_swift_messages", "llava_rlhf"):
        assert len(split_row({**FORMS[form], "question": "Why?"})[0]) == 1
        assert len(split_row({**FORMS[form], "prompt": [SYSTEM, ASKED]})[0]) == 2
        with pytest.raises(BadSampleError, match="question ends with user: 'How"):
            split_row({**FORMS[form], "question": "How?"})


def test_input_and_history_are_of_the_prompt() -> None:
    row = {**FORMS["alpaca"], "input": "The sky.", "history": [["Who?", "me"]]}
    shared, *_ = split_row(row)
    assert [turn["content"] for turn in shared] == ["Who?", "me", "Why?\nThe sky."]
    shared, *_ = split_row({**FORMS["alpaca"], "instruction": "", "input": "The sky."})
    assert shared == [message("user", "The sky.")]
    with pytest.raises(BadSampleError, match="history is not a list"):
        split_row({**row, "history": ["Who?"]})


CALLS = [
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": name}}]}
    for name in "ab"
]
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "media": (
        {**FORMS["ms_swift"], "images": ["1.jpg"], "rejected_images": ["2.jpg"]},
        "media of the rejected answer alone",
    ),
    "alike": (
        {"chosen": [ASKED, GOOD], "rejected": [QUESTION, message("assistant", "because ")]},
        "chosen and rejected are the same",
    ),
    "alike_response": ({**FORMS["ms_swift"], "rejected_response": "because"}, "are the same"),
    "output": ({**FORMS["llava_rlhf"], "output_1": 3}, "output_1 is 3"),
    "no_answers": ({"text": "Why?"}, "no chosen and rejected answer"),
    "prompt": (
        {**WHOLE, "prompt": "Who?"},
        "prompt: prompt ends with user: 'Who\\?', and .* begin with user: 'Why\\?'",
    ),
    "answered": ({**WHOLE, "messages": [ASKED, ANSWER]}, "messages ends with assistant: 'me'"),
    "beginnings": (
        {"chosen": WHOLE["chosen"], "rejected": [message("user", "Who?"), BAD]},
        "chosen and rejected begin with different turns",
    ),
    "no_prompt": ({"chosen": "because", "rejected": "so"}, "the row has no prompt"),
    "no_messages": ({"messages": [], "rejected_response": "so"}, "the row has no prompt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_are_no_pair_are_refused(name: str) -> None:
    row, message = REFUSED[name]
    with pytest.raises(BadSampleError, match=message):
        split_row(row)


@pytest.mark.parametrize(
    "media",
    [
        {"images": ["1.jpg"], "rejected_images": ["1.jpg"]},
        {"image": "1.jpg", "rejected_images": ["1.jpg"]},
        {"images": ["1.jpg"], "rejected_image": {"path": "1.jpg"}, "videos": ["2.mp4"]},
    ],
)
def test_the_same_media_of_the_rejected_answer_are_not_others(media: dict[str, Any]) -> None:
    assert split_row({**FORMS["ms_swift_messages"], **media})[0] == [ASKED]


def test_an_empty_column_of_another_form_hides_no_answer() -> None:
    empty: dict[str, Any] = {
        "rejected_messages": [],
        "rejected_response": "",
        "output_1": None,
        "output_2": None,
    }
    assert split_row({**FORMS["trl"], **empty}) == split_row(FORMS["trl"])


def test_answers_that_call_different_tools_are_not_the_same(tmp_path: Path) -> None:
    calling = {"chosen": [ASKED, CALLS[0]], "rejected": [ASKED, CALLS[1]]}
    assert split_row(calling) == ([ASKED], [CALLS[0]], [CALLS[1]])
    inputs = write_tree(tmp_path / "in", {"a.json": json.dumps([calling, FORMS["ours"]])})
    report, _ = build_source("preferences", inputs, tmp_path / "out", max_failures=0.9)
    assert "calls a tool" in report.quarantined[0].reason


def test_weights_are_kept_and_white_space_makes_no_pair(tmp_path: Path) -> None:
    later = [GOOD, QUESTION, {**GOOD, "weight": 0}]
    rows = [
        {**FORMS["ours"], "chosen": later},
        {**FORMS["rlaif_v"], "rejected": "because "},
    ]
    inputs = write_tree(tmp_path / "in", {"rows.json": json.dumps(rows)})
    report, dataset = build_source("preferences", inputs, tmp_path / "out", max_failures=0.9)
    (sample,) = read_samples(dataset).values()
    assert sample["json"]["chosen"] == later and sample["json"]["rejected"] == [BAD]
    assert [q.reason for q in report.quarantined] == ["answers: chosen and rejected are the same"]


def test_a_weight_of_nan_is_named_as_what_it_is(tmp_path: Path) -> None:
    """NaN differs from itself: the pair was said to contradict its own form."""
    answers = [message("assistant", "because") | {"weight": weight} for weight in (1.0, math.nan)]
    rows = [{"prompt": "Why?", "chosen": [answer], "rejected": "so"} for answer in answers]
    write_parquet(tmp_path / "a.parquet", rows)
    inputs, out = tmp_path / "a.parquet", tmp_path / "out"
    report, dataset = build_source("preferences", inputs, out, max_failures=0.9)
    (reason,) = (found.reason for found in report.quarantined)
    assert dataset.samples() == 1 and "weight nan" in reason and "0 or 1" in reason


def test_a_preview_shows_both_answers() -> None:
    html = format_text({"json": Part("json", json.dumps(FORMS["ours"]).encode())})
    first, second = html.split("rejected:")
    assert "chosen:" in first and "because" in first and "because" not in second
    assert "so" in second and html.count("Why?") == 2
