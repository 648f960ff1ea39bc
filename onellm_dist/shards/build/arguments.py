"""A source's options on the command line: `--depth-model DIR` beside `-o depth_model=DIR`, and `SOURCE --help`."""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.build.registry import all_sources, get_options
from onellm_dist.shards.build.settings import OPTIONS
from onellm_dist.shards.sources.base import Option, Source

_TRUTHS = ("true", "false", "yes", "no", "1", "0")
_WIDTH = 120


def find_source(arguments: Sequence[str]) -> Source | None:
    """The source that a command line names, itself or by a recipe; None: neither (or there is no such thing, which is said later)."""
    named = next((a for a in arguments if not a.startswith("-")), "")
    if named.endswith((".yaml", ".yml")) and Path(named).is_file():
        import yaml

        try:
            content = yaml.safe_load(Path(named).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError):
            return None
        named = str(content.get("source", "")) if isinstance(content, dict) else ""
    return all_sources().get(named) if named else None


def expand_source_flags(arguments: Sequence[str], own: Sequence[str]) -> list[str]:
    """The command line with every `--name value` of the source's options as `--option name=value`.

    Args:
        own: the command's own flags, which stay as they are.

    Raises:
        UsageError: a flag that neither the command nor the source has, or one without its value.
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
            raise _unknown(flag, source, known, own)
        if not equals:
            value = _value(flag, known[name], left)
        result += ["--option", f"{name}={value}"]
    return result


def _value(flag: str, option: Option, left: list[str]) -> str:
    """What follows a flag; a flag that is true or false needs nothing."""
    if option.kind is bool:
        return left.pop(0) if left and left[0].lower() in _TRUTHS else "true"
    if not left or left[0].startswith("--"):
        raise UsageError(
            f"{flag} has no value.",
            option.help + ".",
            f"write {flag} {option.kind.__name__.upper()}.",
        )
    return left.pop(0)


def _unknown(
    flag: str, source: Source, known: Mapping[str, Option], own: Sequence[str]
) -> UsageError:
    flags = [*(f"--{n.replace('_', '-')}" for n in known), *own]
    close = difflib.get_close_matches(flag, flags, n=1)
    return UsageError(
        f"source {source.name!r} has no option {flag}{f'; did you mean {close[0]}?' if close else ''}",
        "an option that is not understood would be ignored.",
        f"see onellm shards build {source.name} --help",
    )


def format_source_help(source: Source) -> str:
    """What `onellm shards build SOURCE --help` prints."""
    inputs = "IN OUT" if source.needs_input else "OUT"
    lines = [
        f"onellm shards build {source.name} {inputs} [--workers N] [--dry-run] [OPTIONS]",
        "",
        f"  {source.summary}",
        "",
    ]
    lines += (
        ["Options of this source (--name VALUE, or -o name=VALUE):", *_listed(source.options)]
        if source.options
        else []
    )
    if source.plan is not None:
        lines += [
            "",
            "Options of every source that reads an input:",
            *_listed(OPTIONS, source.licence),
        ]
    lines += [
        "",
        "Flags of the command itself: onellm shards build --help. What IN must look like: docs/reference/sources.md; recipes: shards/*.yaml.",
    ]
    return "\n".join(lines)


def _listed(options: Mapping[str, Option], licence: str | None = None) -> list[str]:
    lines = []
    for name, option in options.items():
        default = licence if name == "licence" else option.default
        said = (
            ""
            if default in (None, "")
            else f" (default: {str(default).lower() if isinstance(default, bool) else default})"
        )
        kind = {"bool": " true|false", "str": " TEXT", "Path": " PATH", "int": " N", "float": " X"}[
            option.kind.__name__
        ]
        head = f"  --{name.replace('_', '-')}{kind}"
        text = textwrap.wrap(f"{option.help}{said}", _WIDTH - 28)
        lines += [
            f"{head:<27} {text[0]}" if len(head) < 27 else head,
            *(" " * 28 + t for t in (text[1:] if len(head) < 27 else text)),
        ]
    return lines
