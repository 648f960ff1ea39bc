"""Prompts of OneLLM's training (paper, Table 10), and conversations made with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from onellm_dist.common.turns import CONVERSATION_KEYS, TurnsError, find_conversation, parse_turns
from onellm_dist.modalities import all_modalities

_CAPTION = "Provide a one-sentence caption for the provided {}."
CAPTION_PROMPTS: Mapping[str, str] = {
    "image": _CAPTION.format("image"),
    "video": _CAPTION.format("video"),
    "audio": _CAPTION.format("audio"),
    "point": _CAPTION.format("point cloud"),
    "imu": "Describe the motion.",
    "fmri": "Describe the scene based on fMRI data.",
}
"""Modality to the prompt whose answer is a caption.

That of point clouds is Table 11's; their training data has prompts of its own."""
SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly"
REGION = "Provide a short description for this region."
_STORED = {"system": "system", "user": "human", "assistant": "gpt"}
"""Role to the speaker that shards store."""

Turn = dict[str, Any]
"""`{"from": speaker, "value": text}`; the speaker is human, gpt or, in the first turn, system.

`"weight": 0` is kept: the answer is not trained on."""


def make_turns(*pairs: tuple[str, str]) -> list[Turn]:
    """Make turns of questions and their answers."""
    return [
        {"from": who, "value": text}
        for pair in pairs
        for who, text in zip(("human", "gpt"), pair, strict=True)
    ]


def make_caption_turns(modality: str, caption: str) -> list[Turn]:
    """Make turns of a caption: it answers the paper's prompt for captions."""
    return make_turns((CAPTION_PROMPTS[modality], caption.strip()))


def make_question(text: str) -> str:
    """Make an open question with the paper's suffix, which asks for a word or phrase."""
    return f"{text.strip()} {SHORT_ANSWER}"


def make_choice_question(text: str, options: Sequence[str]) -> str:
    """Make a question with options: `{question} A. ... B. ...`, then the request for a letter."""
    listed = " ".join(
        f"{get_option_letter(i)}. {option.strip()}" for i, option in enumerate(options)
    )
    return f"{text.strip()} {listed} {OPTION_LETTER}"


def get_option_letter(number: int) -> str:
    """Get the letter of an option: 0 is A."""
    return chr(ord("A") + number)


def make_region_prompt(
    left: float, top: float, width: float, height: float, size: tuple[float, float]
) -> str:
    """Make the prompt for a region.

    Its box is written as `[left, top, right, bottom]` in shares of the picture's width and height.

    Args:
        left: left edge in pixels.
        top: top edge in pixels.
        width: of the box in pixels.
        height: of the box in pixels.
        size: (width, height) of the picture in pixels.

    Raises:
        ValueError: the box or the picture is empty.
    """
    if not (min(size) > 0 and width > 0 and height > 0):
        raise ValueError(
            f"a box of {width:g} x {height:g} in a picture of {size[0]:g} x {size[1]:g}"
        )
    corners = (left / size[0], top / size[1], (left + width) / size[0], (top + height) / size[1])
    return f"{REGION} [{', '.join(f'{min(1.0, max(0.0, c)):.2f}' for c in corners)}]"


def find_most_common(answers: Iterable[str]) -> str:
    """Find the most frequent answer; of several, the one given first."""
    given = list(answers)
    return max(given, key=given.count)


def require_conversation(row: Mapping[str, Any]) -> Any:
    """Return a row's conversation, for `clean_turns`, which refuses an empty one.

    Raises:
        KeyError: it has none of CONVERSATION_KEYS.
    """
    found = find_conversation(row)
    present = next((key for key in CONVERSATION_KEYS if key in row), None)
    if found is None and present is None:
        raise KeyError(CONVERSATION_KEYS[0])
    return found if found is not None or present is None else row[present]


def clean_turns(raw: Any, *, tags: bool = True, placeholders: bool = False) -> list[Turn]:
    """Convert a conversation of a dataset to the speakers `human`, `gpt` and `system`.

    Answers before the first question, of which ShareGPT has some, are dropped; so is a last
    question without an answer.

    Args:
        raw: the conversation as the dataset has it.
        tags: whether to remove media tags (`<image>`, `<point>`) from the start and the end of a
            turn, because the medium stands before the text anyway. Use False for texts without
            media, where `<video>` belongs to a web page.
        placeholders: whether media among content parts become such tags, for datasets that list
            their media.

    Raises:
        TurnsError: `parse_turns` refuses it, an answer is empty, or no question is answered.
    """
    turns: list[Turn] = []
    parsed = parse_turns(raw, all_modalities(), placeholders=placeholders)
    for number, turn in enumerate(parsed):
        text = (_media_tags().sub("", turn.text) if tags else turn.text).strip()
        if turn.role == "assistant" and not text:
            raise TurnsError(f"turn {number} is an empty answer")
        if turn.role != "assistant" or any(t["from"] == "human" for t in turns):
            weight = {} if turn.weight else {"weight": 0}
            turns.append({"from": _STORED[turn.role], "value": text, **weight})
    while turns and turns[-1]["from"] != "gpt":
        turns.pop()
    if not turns:
        raise TurnsError("the conversation has no answer to a question")
    return turns


@cache
def _media_tags() -> re.Pattern[str]:
    """Media tags at the start or the end of a text; rgbd and rgbn are the reference's own."""
    tag = f"<(?:{'|'.join((*all_modalities(), 'rgbd', 'rgbn'))})>"
    return re.compile(rf"^\s*{tag}\s*|\s*{tag}\s*$")
