"""British spelling throughout, and one of two usual spellings: in prose, messages and names.

Keys of files, and what libraries and published texts spell, stay as they are.
"""

from __future__ import annotations

import re

import pytest
from test_words import lowered

pytestmark = pytest.mark.unmeasured
OTHERS = {
    "-ise, -isation": r"(?:custom|final|general|initial|local|material|maxim|minim|normal|organ"
    r"|quant|recogn|serial|special|standard|summar|synchron|util|vector|visual)iz[eia]",
    "analyse": r"analyz",
    "artefact": r"artifact",
    "behaviour": r"behavior",
    "cancelled": r"cancel(?:ed|ing)",
    "centre": r"(?<![a-z])center(?:s|ed)?(?![a-z])",
    "colour": r"(?<![a-z])color(?:s|ed)?(?![a-z:])",
    "dataset": r"(?<![a-z])data[ -]sets?(?![a-z])",
    "dialogue": r"(?<![a-z])dialogs?(?![a-z])",
    "grey": r"(?<![a-z])gray(?![a-z])",
    "labelled": r"label(?:ed|ing)(?![a-z])",
    "misspelled": r"misspelt",
    "modelling": r"modeling",
    "neighbour": r"neighbor",
    "towards": r"(?<![a-z])toward(?![a-z])",
}
"""How the project spells to what it does not write. *Tokenizer* and *optimizer* are names."""
NAMES = {
    "--error-text-color",
    "dequantize",
    "ggmlquantizationtype",
    "initializer_range",
    "modeling_",
    "modeling_llama",
    "modeling_onellm",
    "quantization_config",
    "prefers-color-scheme",
    "quantize_",
    "unrecognized_links",
}
"""Names of libraries and of their keys, in lower case, that stand alone."""
QUOTED = {
    "onellm_dist/evaluation/tasks/grading.py": {
        "analyse": "the paper's prompt",
        "colour": "the paper's prompt",
    },
    "onellm_dist/shards/sources/toyworld/tokenizer.py": {"colour": "text that it was trained on"},
    "tests/shards/sources/test_source_conversations.py": {"colour": "a question of a dataset"},
    "tests/shards/sources/test_source_vqa.py": {"colour": "a question of a dataset"},
}
"""File -> spelling -> why it stays."""


def find(pattern: re.Pattern[str], text: str) -> list[str]:
    """The words in lower-case text that a pattern finds, without keys and names of libraries."""
    words = []
    for match in pattern.finditer(text):
        start, end = match.span()
        while start and (text[start - 1].isalnum() or text[start - 1] in "_.-"):
            start -= 1
        while end < len(text) and (text[end].isalnum() or text[end] in "_-"):
            end += 1
        around = text[max(0, start - 1) : start], text[end : end + 1]
        is_key = around in {('"', '"'), ("'", "'"), ("{", "}")} or around[1] == "="
        is_attribute = "." in text[start : match.start()]
        if not (is_key or is_attribute or text[start:end] in NAMES):
            words.append(text[start:end])
    return words


@pytest.mark.parametrize("spelling", OTHERS)
def test_one_spelling(spelling: str) -> None:
    pattern = re.compile(OTHERS[spelling])
    found = {
        name: words
        for name, text in lowered().items()
        if name != "tests/test_spelling.py" and spelling not in QUOTED.get(name, {})
        if (words := find(pattern, text))
    }
    assert not found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("def normalize_text(", ["normalize_text"]),
        ('"""normalized rows', ["normalized"]),
        ("two data sets and a color", ["color"]),
        ('f.normalize(x), {"color": 1}, normalized=false, {color}', []),
    ],
)
def test_keys_and_names_of_libraries_are_left_out(text: str, found: list[str]) -> None:
    pattern = re.compile("|".join(OTHERS[name] for name in ("-ise, -isation", "colour")))
    assert find(pattern, text) == found
