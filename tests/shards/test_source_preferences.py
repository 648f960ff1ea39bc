"""The source preferences: rows of all forms become the same samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
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
    row = {**FORMS["ours"], "conversations": [SYSTEM, QUESTION], "system": "Be long."}
    assert split_row(row)[0] == [SYSTEM, QUESTION]


def test_input_and_history_are_of_the_prompt() -> None:
    row = {**FORMS["alpaca"], "input": "The sky.", "history": [["Who?", "me"]]}
    shared, *_ = split_row(row)
    assert [turn["content"] for turn in shared] == ["Who?", "me", "Why?\nThe sky."]
    with pytest.raises(BadSampleError, match="history is not a list"):
        split_row({**row, "history": ["Who?"]})


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
}


@pytest.mark.parametrize("name", REFUSED)
def test_rows_that_are_no_pair_are_refused(name: str) -> None:
    row, message = REFUSED[name]
    with pytest.raises(BadSampleError, match=message):
        split_row(row)


def test_the_same_media_of_the_rejected_answer_are_no_others() -> None:
    media = {"images": ["1.jpg"], "rejected_images": ["1.jpg"]}
    assert split_row({**FORMS["ms_swift_messages"], **media})[0] == [ASKED]


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


def test_a_preview_shows_both_answers() -> None:
    html = format_text({"json": Part("json", json.dumps(FORMS["ours"]).encode())})
    first, second = html.split("rejected:")
    assert "chosen:" in first and "because" in first and "because" not in second
    assert "so" in second and html.count("Why?") == 2
