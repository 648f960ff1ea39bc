"""Placeholders in texts: where the spans of a sample's media stand (`<image>`, `<audio>`).

The k-th placeholder of a modality is its k-th medium. A modality without placeholders stands behind
BOS, as in the paper, in the order of the modalities; one with placeholders has as many of them as
media. Tokenizers see a placeholder as one token of its own (a *mark*), which is then taken out, so
that what stands around it is encoded as in any model that has an `<image>` token.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import SampleError

_OPEN, _CLOSE = "\ue0f0", "\ue0f1"
"""Characters for private use: what stands between them in a text is a mark."""


class PlacedMedium(NamedTuple):
    """Where a medium stands in its text."""

    number: int
    """Number of the medium among the sample's media."""
    place: int
    """How many text tokens stand before it, BOS included."""


PlacedSpan = tuple[str, int] | tuple[str, int, int]
"""Modality of a span, how many text tokens stand before it, and its number within its medium (left
out where it is 0)."""


def list_medium_spans(modality: str, place: int, count: int) -> list[PlacedSpan]:
    """List the spans of one medium.

    Args:
        modality: its modality.
        place: how many text tokens stand before it.
        count: how many spans it takes.
    """
    return [(modality, place, number) if number else (modality, place) for number in range(count)]


def make_mark(modality: str) -> str:
    """Make the mark that stands for a placeholder while a text is encoded."""
    return f"{_OPEN}{modality}{_CLOSE}"


def remove_marks(text: str) -> str:
    """Remove the marks of media from a text, and nothing else of it."""
    return re.sub(f"{_OPEN}[^{_CLOSE}]*{_CLOSE}", "", text)


def mark_placeholders(text: str, modalities: Collection[str]) -> str:
    """Replace the placeholders of some modalities by marks.

    Raises:
        SampleError: the text has characters that marks are made of.
    """
    if _OPEN in text or _CLOSE in text:
        raise SampleError(
            f"its text has the character U+{ord(_OPEN if _OPEN in text else _CLOSE):04X}, which is "
            "for private use",
            "the places of media are marked with it.",
            "remove it from the text.",
        )
    if not modalities or "<" not in text:
        return text
    pattern = f"<({'|'.join(map(re.escape, modalities))})>"
    return re.sub(pattern, lambda match: make_mark(match[1]), text)


def add_marks(backend: Tokenizer, modalities: Sequence[str]) -> tuple[Tokenizer, dict[int, str]]:
    """Return a copy of a tokenizer that reads marks as tokens, and id to modality of these.

    Args:
        backend: the tokenizer; it is not changed.
        modalities: the modalities whose marks it reads.
    """
    copy = Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = backend.encode_special_tokens
    copy.add_tokens([AddedToken(make_mark(m), normalized=False, special=False) for m in modalities])
    ids = {copy.token_to_id(make_mark(m)): m for m in modalities}
    return copy, {number: m for number, m in ids.items() if number is not None}


def take_out_marks(
    ids: Sequence[int], labels: Sequence[int], marks: Mapping[int, str]
) -> tuple[list[int], list[int], list[tuple[str, int]]]:
    """Separate the tokens of a text from its marks.

    Args:
        ids: the tokens, marks among them.
        labels: one value for each.
        marks: id to modality of the marks.

    Returns:
        The tokens, their values, and modality and place of each mark.
    """
    text: list[int] = []
    values: list[int] = []
    found: list[tuple[str, int]] = []
    for token, label in zip(ids, labels, strict=True):
        name = marks.get(token)
        if name is not None:
            found.append((name, len(text)))
        else:
            text.append(token)
            values.append(label)
    return text, values, found


def check_placeholders(text: str, media: Sequence[str], modalities: Collection[str]) -> None:
    """Check that a text has one placeholder for each medium of a modality, or none.

    Args:
        text: the text, all turns of a conversation together.
        media: the modality of each medium.
        modalities: those whose placeholders count.

    Raises:
        SampleError: it has more or fewer, or characters that marks are made of.
    """
    marked = mark_placeholders(text, modalities)
    found = re.findall(f"{_OPEN}(.+?){_CLOSE}", marked)
    place_media([(name, 1) for name in found], media, modalities)


def place_media(
    found: Sequence[tuple[str, int]], media: Sequence[str], order: Iterable[str]
) -> list[PlacedMedium]:
    """Say where the media of a sample stand, in the order of the sequence.

    Args:
        found: modality and place of each placeholder, in the order of the text.
        media: the modality of each medium.
        order: all modalities, in the order of the media behind BOS.

    Raises:
        SampleError: a modality has placeholders, but not as many as media.
    """
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(media):
        numbers.setdefault(name, []).append(number)
    placed = {name for name, _ in found}
    for name in dict.fromkeys(name for name, _ in found):
        count, have = sum(n == name for n, _ in found), len(numbers.get(name, ()))
        if count != have:
            raise SampleError(
                f"its text has {count} <{name}> for "
                f"{format_count(have, 'medium', 'media')} of modality {name}",
                "texts would be shown with the wrong media.",
                "write one placeholder for each medium, or none: they then stand before the text.",
            )
    first = [
        PlacedMedium(number, 1)
        for name in order
        if name not in placed
        for number in numbers.get(name, ())
    ]
    return first + [PlacedMedium(numbers[name].pop(0), place) for name, place in found]
