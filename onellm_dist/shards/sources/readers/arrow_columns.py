"""Which columns of a parquet or Arrow table hold media, captions and conversations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.turns import CONVERSATION_KEYS
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.shards.format.names import get_modality_parts
from onellm_dist.shards.sources.readers.table_columns import (
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    ROLE_ENDINGS,
)

if TYPE_CHECKING:
    import pyarrow

PAIRS = "texts"
"""FineVision's column of `{user, assistant}`."""
_PLURAL = ("s", "es")
_ANSWERS = (("question", "answer"), ("question", "answers"), ("instruction", "output"))


@dataclass(frozen=True)
class ArrowColumns:
    """What the columns of a table hold."""

    media: Mapping[str, tuple[str, ...]]
    """Column of media to the extensions that its part accepts, the usual one first."""
    caption: str | None
    turns: str | None
    """The column of conversations."""
    answers: tuple[str, str] | None
    """The columns of questions and of their answers."""
    classes: Sequence[str]
    """Names of the classes that numbers in the column of captions stand for."""


def find_arrow_columns(
    path: Path,
    schema: pyarrow.Schema,
    modalities: Sequence[str],
    caption: str | None,
    media: str | None,
) -> ArrowColumns:
    """Find out what the columns hold, by their names and types.

    Args:
        path: the file, for errors.
        schema: its columns.
        modalities: those of the dataset.
        caption: the user's column of captions.
        media: the user's column of media.

    Raises:
        UsageError: a column is missing, or which one is meant is unclear.
    """
    names = {name.lower(): name for name in reversed(schema.names)}
    for wanted in (caption, media):
        if wanted is not None and wanted not in schema.names:
            raise UsageError(
                f"{path} has no column {wanted!r}.",
                f"it has {', '.join(schema.names)}.",
                "name one of them.",
            )
    found: dict[str, tuple[str, ...]] = {}
    for name in modalities:
        modality = get_modality(name)
        for role, accepted in get_modality_parts(modality).items():
            needed = role in modality.required_parts
            own = media if needed else None
            # An optional part is in a column of its name: the only column of bytes is not it.
            column = _find_media_column(schema, names, role, accepted, own, named=not needed)
            if column is not None and column not in found:
                found[column] = accepted
            elif needed:
                raise _make_media_error(path, schema, role)
    text = caption or next((names[c] for c in CAPTION_COLUMNS if c in names), None)
    turns = next((names[k] for k in (*CONVERSATION_KEYS, PAIRS) if k in names), None)
    pair = next(((names[q], names[a]) for q, a in _ANSWERS if q in names and a in names), None)
    if turns is None and pair is None and text is None:
        raise UsageError(
            f"{path} has no column of captions or conversations.",
            f"it has {', '.join(schema.names)}.",
            "name the captions: -o caption_column=NAME.",
        )
    return ArrowColumns(found, text, turns, pair, _read_classes(schema, text))


def infer_modality(path: Path, schema: pyarrow.Schema) -> str:
    """Infer the one modality of a table from the names and types of its columns.

    Raises:
        UsageError: none is found, or several.
    """
    names = {name.lower(): name for name in reversed(schema.names)}
    types = _read_features(schema)
    found = {
        name
        for name, modality in all_modalities().items()
        for role, accepted in modality.required_parts.items()
        if role == name and _find_media_column(schema, names, role, accepted, None, named=True)
    }
    found |= {str(t.get("_type")).lower() for t in types.values()} & {"image", "audio", "video"}
    # A depth map comes with its picture.
    found = {n for n in found if not any(_needs(other, n) for other in found - {n})}
    if len(found) != 1:
        raise UsageError(
            f"{path}: the columns {', '.join(schema.names)} do not determine the modality"
            f"{': ' + ' or '.join(sorted(found)) if found else ''}.",
            "a dataset has one modality, or one combination that every sample has.",
            "name it: -o modality=NAME (and -o media_column=NAME), or -o modality=text.",
        )
    return found.pop()


def _needs(modality: str, part: str) -> bool:
    return part in get_modality(modality).required_parts


def _find_media_column(
    schema: pyarrow.Schema,
    names: Mapping[str, str],
    role: str,
    accepted: Sequence[str],
    own: str | None,
    *,
    named: bool = False,
) -> str | None:
    """Find the column of a part: the user's, one named after the part, or the only one of bytes.

    Args:
        schema: the table's columns.
        names: name in lower case to name.
        role: the part.
        accepted: its extensions.
        own: the user's column.
        named: whether the name must be that of the part or of an extension.
    """
    if own is not None:
        return own
    wanted = [role + ending + s for ending in ROLE_ENDINGS for s in ("", *_PLURAL)]
    wanted += [e for e in accepted if e not in CAPTION_COLUMNS]
    for name in wanted:
        if name in names and _may_hold_media(schema.field(names[name]).type):
            return names[name]
    if named:
        return None
    generic = (names[n] for n in FILE_COLUMNS if n in names)
    by_name = next((n for n in generic if _may_hold_media(schema.field(n).type)), None)
    if by_name is not None:
        return by_name
    binary = [f.name for f in schema if _holds_bytes(f.type)]
    return binary[0] if len(binary) == 1 else None


def _may_hold_media(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return True
    return _holds_bytes(kind) or types.is_string(kind) or types.is_large_string(kind)


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    if types.is_list(kind) or types.is_large_list(kind):
        return _holds_bytes(kind.value_type)
    if types.is_struct(kind):
        return "bytes" in {kind.field(i).name for i in range(kind.num_fields)}
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _make_media_error(path: Path, schema: pyarrow.Schema, role: str) -> UsageError:
    return UsageError(
        f"{path}: no column holds the part {role!r} (columns: {', '.join(schema.names)}).",
        "media are bytes, {bytes, path}, an array, or a file's name; URLs are none.",
        f"name it: -o media_column=NAME; or call it {role!r}. For tars with a parquet beside each, "
        "use the source laion400m.",
    )


def _read_features(schema: pyarrow.Schema) -> dict[str, dict[str, Any]]:
    """Read the types that Hugging Face's datasets keeps beside the columns; empty: none."""
    try:
        kept = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = kept["info"]["features"]
        return {n: f for n, f in features.items() if isinstance(f, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _read_classes(schema: pyarrow.Schema, column: str | None) -> Sequence[str]:
    names = _read_features(schema).get(column or "", {}).get("names")
    return [str(n) for n in names] if isinstance(names, list) else []
