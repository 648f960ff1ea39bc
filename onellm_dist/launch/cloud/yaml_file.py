"""YAML that every reader understands alike: a text is quoted unless it can be nothing else.

PyYAML leaves `1e-5` and `y` bare, which other readers take for a number and a truth value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*")
_LINE_BREAK = re.compile("[\r\n\x85\u2028\u2029]")
_WORDS = frozenset(["y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"])


class _QuotingDumper(yaml.SafeDumper):
    """Texts of several lines are literal blocks."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        """Indent the items of lists, as Kubernetes' own files do."""
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        """Write a list that is used twice twice: `*id001` is nothing to read."""
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style: str | None = '"'
    if "\n" in text and not re.search(r"[^\n\x20-\x7e\xa0-\u2027\u202a-\ud7ff]", text):
        style = "|"
    elif _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        style = None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_QuotingDumper.add_representer(str, _represent_text)


def format_yaml(documents: Sequence[Mapping[str, Any]], comments: Sequence[str]) -> str:
    """Format documents as one file.

    Args:
        documents: what it holds.
        comments: lines above it, without their `#`; what YAML takes for a line break is escaped.
    """
    text = yaml.dump_all(
        documents,
        Dumper=_QuotingDumper,
        sort_keys=False,
        allow_unicode=True,
        width=1 << 16,
        explicit_start=len(documents) > 1,
    )
    lines = (_LINE_BREAK.sub(lambda found: f"\\u{ord(found[0]):04x}", line) for line in comments)
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + text
