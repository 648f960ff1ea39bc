"""A source's options on the command line.

`--depth-model DIR` stands for `-o depth_model=DIR`, and `SOURCE --help` lists the options.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.build.registry import all_sources, get_options
from onellm_dist.shards.build.settings import OPTIONS
from onellm_dist.shards.sources.base import Option, Source

_TRUTHS = ("true", "false", "yes", "no", "1", "0")
_WIDTH = 120
"""Characters of a line of help."""
_INDENT = 28
"""Column at which the help texts of options begin."""
_VALUES = {"bool": " true|false", "str": " TEXT", "Path": " PATH", "int": " N", "float": " X"}
"""Type of an option to what the help shows as its value."""


def find_source(arguments: Sequence[str]) -> Source | None:
    """Return the source that a command line names, directly or by a recipe.

    Returns:
        None if it names none, or an unknown one (which is reported later).
    """
    named = next((a for a in arguments if not a.startswith("-")), "")
    if named.endswith((".yaml", ".yml")) and Path(named).is_file():
        try:
            content = yaml.safe_load(Path(named).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return None
        named = str(content.get("source", "")) if isinstance(content, dict) else ""
    return all_sources().get(named) if named else None


def expand_source_flags(arguments: Sequence[str], own: Sequence[str]) -> list[str]:
    """Rewrite every `--name value` of the source's options to `--option name=value`.

    Args:
        arguments: the command line.
        own: the command's own flags, which stay as they are.

    Raises:
        UsageError: neither the command nor the source has a flag, or a flag has no value.
    """
    source = find_source(arguments)
    known = get_options(source) if source is not None else {}
    result, left = list[str](), list(arguments)
    while left:
        argument = left.pop(0)
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--") or flag in own or flag == "--" or source is None:
            result.append(argument)
            if flag == "--":
                return result + left
            continue
        name = flag.removeprefix("--").replace("-", "_")
        if name not in known:
            raise _make_unknown_flag_error(flag, source, known, own)
        if not equals:
            value = _take_value(flag, known[name], left)
        result += ["--option", f"{name}={value}"]
    return result


def _take_value(flag: str, option: Option, left: list[str]) -> str:
    """Take what follows a flag; a flag of true or false needs no value."""
    if option.kind is bool:
        return left.pop(0) if left and left[0].lower() in _TRUTHS else "true"
    if not left or left[0].startswith("--"):
        raise UsageError(
            f"{flag} has no value.",
            option.help + ".",
            f"write {flag} {option.kind.__name__.upper()}.",
        )
    return left.pop(0)


def _make_unknown_flag_error(
    flag: str, source: Source, known: Mapping[str, Option], own: Sequence[str]
) -> UsageError:
    flags = [*(f"--{n.replace('_', '-')}" for n in known), *own]
    close = difflib.get_close_matches(flag, flags, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return UsageError(
        f"source {source.name!r} has no option {flag}{hint}",
        "an option that is not understood would be ignored.",
        f"see onellm shards build {source.name} --help",
    )


def format_source_help(source: Source) -> str:
    """Format what `onellm shards build SOURCE --help` prints."""
    inputs = "IN OUT" if source.needs_input else "OUT"
    lines = [
        f"onellm shards build {source.name} {inputs} [--workers N] [--dry-run] [OPTIONS]",
        "",
        f"  {source.summary}",
        "",
    ]
    if source.options:
        lines += [
            "Options of this source (--name VALUE, or -o name=VALUE):",
            *_format_options(source.options),
        ]
    if source.plan is not None:
        lines += [
            "",
            "Options of every source that reads an input:",
            *_format_options(OPTIONS, source.licence),
        ]
    lines += [
        "",
        "The flags of the command itself: onellm shards build --help. "
        "What IN must look like: docs/reference/sources.md. Recipes: shards/*.yaml.",
    ]
    return "\n".join(lines)


def _format_options(options: Mapping[str, Option], licence: str | None = None) -> list[str]:
    lines = []
    for name, option in options.items():
        default = licence if name == "licence" else option.default
        if isinstance(default, bool):
            default = str(default).lower()
        note = "" if default in (None, "") else f" (default: {default})"
        head = f"  --{name.replace('_', '-')}{_VALUES[option.kind.__name__]}"
        text = textwrap.wrap(f"{option.help}{note}", _WIDTH - _INDENT)
        if len(head) < _INDENT - 1:
            lines.append(f"{head:<{_INDENT - 1}} {text[0]}")
            text = text[1:]
        else:
            lines.append(head)
        lines += [" " * _INDENT + line for line in text]
    return lines
