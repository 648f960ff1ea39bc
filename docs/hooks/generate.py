"""Writes the reference pages from the code when the site is built: nothing is listed twice.

A page of `docs/` asks for a table with a line `<!-- generated: NAME -->`; GENERATORS has the names.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARKER = re.compile(r"^<!-- generated: ([a-z-]+) -->$", re.M)
EXAMPLE = re.compile(r"^\s*(?:Examples?):(.*)", re.S | re.M)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the markers of a page (called by MkDocs)."""
    return MARKER.sub(lambda match: GENERATORS[match.group(1)](), markdown)


def on_config(config: Any) -> Any:
    """Make the checkout importable (called by MkDocs)."""
    sys.path.insert(0, str(ROOT))
    return config


def cell(text: object) -> str:
    """`text` for a table cell."""
    return " ".join(str(text).replace("|", "\\|").split())


def table(header: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows]) + "\n"


def commands() -> str:
    """Every command of `onellm`, from the same objects that `--help` prints."""
    import typer

    from onellm_dist.cli import app
    from onellm_dist.cli.generate import add_modality_options

    add_modality_options()
    return "\n".join(_command_pages(typer.main.get_command(app), ["onellm"]))


def _command_pages(command: Any, path: list[str]) -> Iterator[str]:
    children = getattr(command, "commands", {})
    if len(path) > 1:
        yield f"{'##' if len(path) == 2 else '###'} {' '.join(path)}\n"
        yield from _help_text(command)
        if not children:
            yield from _options(command)
    for name, child in children.items():
        yield from _command_pages(child, [*path, name])


def _help_text(command: Any) -> Iterator[str]:
    text = inspect.cleandoc(f"{command.help or ''}\n\n{command.epilog or ''}")
    examples = EXAMPLE.search(text)
    prose = text[: examples.start()] if examples else text
    yield prose.replace("[", "\\[") + "\n"
    if examples:
        lines = [line.strip() for line in examples.group(1).strip().splitlines()]
        yield "```bash\n" + "\n".join(line for line in lines if line) + "\n```\n"


def _options(command: Any) -> Iterator[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    if arguments:
        rows = [(f"`{p.metavar or p.name.upper()}`", _clean(p.help)) for p in arguments]
        yield table(("argument", "meaning"), rows)
    if options:
        cells = [(f"`{', '.join(p.opts)}`", _clean(p.help), _default(p)) for p in options]
        yield table(("option", "meaning", "default"), cells)


def _clean(help_text: str | None) -> str:
    return re.sub(r"\\(\[|\])", r"\1", help_text or "").replace("[", "\\[").replace("<", "&lt;")


def _default(option: Any) -> str:
    if option.required:
        return "required"
    if isinstance(option.show_default, str):
        return option.show_default.replace("[", "\\[").replace("<", "&lt;")
    if option.is_flag or option.default in (None, (), "") or callable(option.default):
        return ""
    return f"`{option.default}`"


def recipe_keys() -> str:
    """Every key of a recipe, section by section, from the schema."""
    from onellm_dist.config.keys import describe_keys

    sections: dict[str, list[tuple[object, ...]]] = {}
    for key in describe_keys():
        row = (f"`{key.name}`", f"`{key.type}`", f"`{key.default}`", key.description)
        sections.setdefault(key.name.split(".")[0], []).append(row)
    header = ("key", "type", "default", "meaning")
    return "\n".join(f"## {name}\n\n{table(header, rows)}" for name, rows in sections.items())


def public_names() -> str:
    """The names that `onellm_dist` exports, with the first line of each docstring."""
    import onellm_dist

    rows = []
    for name in onellm_dist.__all__:
        if not name.startswith("_"):
            text = inspect.cleandoc(getattr(onellm_dist, name).__doc__ or "")
            rows.append((f"`{name}`", text.split("\n\n")[0]))
    return table(("name", "what it is"), rows)


def modalities() -> str:
    """What a file of each modality must look like: the docstring of its class."""
    from onellm_dist.modalities import all_modalities

    parts = []
    for name, modality in all_modalities().items():
        accepted = {**modality.required_parts, **modality.optional_parts}
        rows = [
            (
                f"`{part}`",
                ", ".join(f"`.{e}`" for e in extensions),
                "required" if part in modality.required_parts else "optional",
            )
            for part, extensions in accepted.items()
        ]
        module = sys.modules[type(modality).__module__]
        said = (module.__doc__ or "", type(modality).__doc__ or "")
        text = "\n\n".join(inspect.cleandoc(part) for part in said if part)
        shape = " × ".join(map(str, modality.value_shape))
        parts.append(
            f"## {name}\n\n{text}\n\nThe model's input: `[{shape}]`.\n\n"
            + table(("part", "files", ""), rows)
        )
    return "\n".join(parts)


def sources() -> str:
    """Every dataset source with its options."""
    from onellm_dist.shards.build.registry import all_sources

    parts = []
    for name, source in all_sources().items():
        rows = [(f"`{n}`", o.help, f"`{o.default}`") for n, o in source.options.items()]
        text = source.summary
        options = table(("option", "meaning", "default"), rows) if rows else ""
        parts.append(f"### `{name}`\n\n{text}.\n\n{options}")
    return "\n".join(parts)


def metrics() -> str:
    """Every metric of a step, from the list that the run itself uses."""
    from onellm_dist.train.records.metrics import METRICS

    rows = [(f"`{m.name}`", m.type, m.unit, m.meaning, "yes" if m.charted else "") for m in METRICS]
    return table(("field", "type", "unit", "meaning", "charted"), rows)


def events() -> str:
    """Every event, from the list that a test compares with the code."""
    from onellm_dist.train.records.event_fields import EVENT_FIELDS

    rows = [
        (f"`{name}`", event.when, " ".join(f"`{field}`" for field in event.fields))
        for name, event in EVENT_FIELDS.items()
    ]
    return table(("event", "when", "fields"), rows)


def _first_sentence(path: Path) -> str:
    """The first sentence of a YAML file's opening comment, without the command in it."""
    comment = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        comment.append(line[2:])
    text = re.sub(r":\s*`onellm [^`]*`", "", " ".join(comment))
    return re.split(r"(?<=[^.]\.)\s", text)[0].rstrip(".:")


def dataset_recipes() -> str:
    """The dataset recipes in `shards/`, with the first sentence of each."""
    paths = sorted((ROOT / "shards").glob("*.yaml"))
    rows = [(f"`shards/{path.name}`", _first_sentence(path)) for path in paths]
    return table(("recipe", "what it builds"), rows)


def training_recipes() -> str:
    """The recipes in `launch/recipes/`, by the name that commands take."""
    folder = ROOT / "launch/recipes"
    paths = sorted(folder.rglob("*.yaml"), key=lambda p: (len(p.parts), p))
    rows = [
        (f"`{path.relative_to(folder).with_suffix('')}`", _first_sentence(path)) for path in paths
    ]
    return table(("name", "what it trains"), rows)


GENERATORS: dict[str, Callable[[], str]] = {
    "commands": commands,
    "recipe-keys": recipe_keys,
    "dataset-recipes": dataset_recipes,
    "training-recipes": training_recipes,
    "events": events,
    "metrics": metrics,
    "modalities": modalities,
    "public-names": public_names,
    "sources": sources,
}
