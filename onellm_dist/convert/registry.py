"""The formats that exist, found by reading the files in `formats/`.

Importing this module imports none of them, so that `onellm convert --help` is instant.
"""

from __future__ import annotations

import ast
import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.folder_kinds import identify_folder
from onellm_dist.convert.tensors.file_kinds import identify_file

_FOLDER = Path(__file__).parent / "formats"
_PLAN_FUNCTION = "plan_output"
"""The function that only writable formats have."""


@dataclass(frozen=True)
class FormatInfo:
    """What is known of a format without importing it; `formats/__init__.py` describes the fields.

    Attributes:
        name: what users type.
        module: name of its module in `formats/`.
        kind: what its checkpoints hold.
        order: its place in help and recognition.
        about: one sentence about it.
        example: a path for the example in help.
        default_target: the format that is written where the user names none.
        is_writable: whether checkpoints of this format can be written.
    """

    name: str
    module: str
    kind: str
    order: int
    about: str
    example: str
    default_target: str
    is_writable: bool


@cache
def list_formats() -> dict[str, FormatInfo]:
    """Name -> format, in their order."""
    found = [info for path in _FOLDER.glob("*.py") if (info := _read_info(path)) is not None]
    return {info.name: info for info in sorted(found, key=lambda info: (info.order, info.name))}


def _read_info(path: Path) -> FormatInfo | None:
    """The literals that a module assigns and whether it can write; None: it is not a format."""
    values: dict[str, Any] = {}
    functions: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            functions.add(node.name)
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Constant)
        ):
            values[node.targets[0].id] = node.value.value
    if "NAME" not in values:
        return None
    return FormatInfo(
        name=values["NAME"],
        module=path.stem,
        kind=values["KIND"],
        order=values["ORDER"],
        about=values["ABOUT"],
        example=values["EXAMPLE"],
        default_target=values["DEFAULT_TARGET"],
        is_writable=_PLAN_FUNCTION in functions,
    )


def list_writable() -> list[str]:
    """Names of the formats that can be written."""
    return [info.name for info in list_formats().values() if info.is_writable]


def import_format(name: str) -> Any:
    """The module of a format; `formats/__init__.py` says what it has.

    Raises:
        UsageError: there is no format of that name.
    """
    formats = list_formats()
    if name not in formats:
        raise UsageError(
            f"unknown format {name!r}", "nothing can read it.", f"known: {', '.join(formats)}."
        )
    return importlib.import_module(f"onellm_dist.convert.formats.{formats[name].module}")


def recognise_format(path: Path) -> str:
    """The name of the format that `path` has.

    Raises:
        UsageError: the path does not exist, or no format fits.
    """
    if not path.exists():
        raise UsageError(f"no checkpoint {path}", "there is nothing to read.", "check the path.")
    formats = list_formats()
    for name in formats:
        if import_format(name).is_format(path):
            return name
    if (kind := identify_folder(path) or identify_file(path)) is not None:
        raise UsageError(f"{path} is {kind.what}", "no format reads it.", kind.do)
    raise UsageError(
        f"{path} has none of the known formats",
        "nothing can read it.",
        f"known: {', '.join(formats)}.",
    )
