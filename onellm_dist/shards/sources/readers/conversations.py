"""Prompts of OneLLM's training (paper, Table 10), and conversations made with them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from onellm_dist.common.turns import TurnsError, parse_turns

CAPTION_PROMPTS: Mapping[str, str] = {
    **{
        name: f"Provide a one-sentence caption for the provided {called}."
        for name, called in (
            ("image", "image"),
            ("video", "video"),
            ("audio", "audio"),
            ("point", "point cloud"),
        )
    },
    "imu": "Describe the motion.",
    "fmri": "Describe the scene based on fMRI data.",
}
"""Modality to the prompt whose answer is a caption (of point clouds: Table 11's; their training data has prompts of its own)."""
SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly"
REGION = "Provide a short description for this region."
_TAG = r"<(?:image|video|audio|point|depth|normal|imu|fmri|rgbd|rgbn)>"
_TAGS = re.compile(rf"^\s*{_TAG}\s*|\s*{_TAG}\s*$")
_STORED = {"system": "system", "user": "human", "assistant": "gpt"}
"""Role to the speaker that shards store."""

Turn = dict[str, str]
"""`{"from": "human", "gpt", or in the first turn "system", "value": text}`."""


def make_turns(*pairs: tuple[str, str]) -> list[Turn]:
    """Questions and their answers as turns."""
    return [
        {"from": who, "value": text}
        for pair in pairs
        for who, text in zip(("human", "gpt"), pair, strict=True)
    ]


def make_caption_turns(modality: str, caption: str) -> list[Turn]:
    """A caption as the answer to the paper's prompt for it."""
    return make_turns((CAPTION_PROMPTS[modality], caption.strip()))


def make_question(text: str) -> str:
    """An open question with the paper's suffix: `{Question} Answer the question using a single word or phrase.`"""
    return f"{text.strip()} {SHORT_ANSWER}"


def make_choice_question(text: str, options: Sequence[str]) -> str:
    """A question with options: `{Question} A. ... B. ... Answer with the option's letter from the given choices directly`."""
    listed = " ".join(
        f"{get_option_letter(i)}. {option.strip()}" for i, option in enumerate(options)
    )
    return f"{text.strip()} {listed} {OPTION_LETTER}"


def get_option_letter(number: int) -> str:
    """0 -> A."""
    return chr(ord("A") + number)


def make_region_prompt(
    left: float, top: float, width: float, height: float, size: tuple[float, float]
) -> str:
    """The prompt for a region, with its box as `[left, top, right, bottom]` in shares of the whole picture's width and height.

    Raises:
        ValueError: the box is empty, or the picture is.
    """
    if not (min(size) > 0 and width > 0 and height > 0):
        raise ValueError(
            f"a box of {width:g} x {height:g} in a picture of {size[0]:g} x {size[1]:g}"
        )
    corners = (left / size[0], top / size[1], (left + width) / size[0], (top + height) / size[1])
    return f"{REGION} [{', '.join(f'{min(1.0, max(0.0, c)):.2f}' for c in corners)}]"


def find_most_common(answers: Iterable[str]) -> str:
    """The answer that most people gave; of several, the one given first."""
    given = list(answers)
    return max(given, key=given.count)


def clean_turns(raw: Any, *, tags: bool = True) -> list[Turn]:
    """A conversation of a dataset: speakers as `human` and `gpt`, and `system` in the first turn.

    Answers before the first question, of which ShareGPT has some, are dropped, and a last question without an answer too.

    Args:
        tags: take media tags (`<image>`, `<point>`) from the start and the end of a turn: the medium stands before the text
            anyhow. False for texts without media, where `<video>` is a web page's.

    Raises:
        TurnsError: `parse_turns` refuses it, an answer is empty, or no question is answered.
    """
    turns: list[Turn] = []
    for number, turn in enumerate(parse_turns(raw)):
        text = (_TAGS.sub("", turn.text) if tags else turn.text).strip()
        if turn.role == "assistant" and not text:
            raise TurnsError(f"turn {number} is an empty answer")
        if turn.role != "assistant" or any(t["from"] == "human" for t in turns):
            turns.append({"from": _STORED[turn.role], "value": text})
    while turns and turns[-1]["from"] != "gpt":
        turns.pop()
    if not turns:
        raise TurnsError("the conversation has no answer to a question")
    return turns
