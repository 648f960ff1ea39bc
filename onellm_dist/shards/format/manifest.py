"""`manifest.json`: which shards a dataset has. It is checked as a whole before anything is read.

The file ends with the SHA-256 of what stands before it, so that a damaged manifest is not taken for
another dataset. Manifests of 0.1.0 have no such line, and are checked by their structure alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.shards.format.valid_names import check_name, find_bad_shard_path

MANIFEST = "manifest.json"
FORMAT = "onellm-shards"
VERSION = 1
SHARD_FOLDER = "shards"
_CHECKSUM = "checksum"
_LAST_LINE = ',\n  "checksum": "'
"""What stands before the checksum: it is that of all bytes before this."""
_REPAIRED = re.compile(r"\.repaired-[1-9]\d{0,8}$")
_HEX = frozenset("0123456789abcdef")
_MOST = 1 << 53
"""Sizes and counts are below this, as in any JSON reader."""


@dataclass(frozen=True)
class ShardInfo:
    """One tar, as the manifest lists it."""

    path: str
    """Relative to the dataset's folder, with forward slashes."""
    split: str
    samples: int
    bytes: int
    """Size of the tar."""
    sha256: str
    """Hex digest of the tar."""

    @property
    def name(self) -> str:
        """The shard's name in sample ids and sidecar files.

        It is the path without `shards/` and `.tar`, with `__` for other slashes, and without the
        `.repaired-1` of a tar that a repair has written again.
        """
        return get_shard_name(self.path)


def get_shard_name(path: str) -> str:
    """Return the name of the shard at a path (see `ShardInfo.name`)."""
    name = path.removeprefix(f"{SHARD_FOLDER}/").removesuffix(".tar").replace("/", "__")
    return _REPAIRED.sub("", name) if ".repaired-" in name else name


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`, which a writer writes last: with it the dataset is complete."""

    name: str
    """The dataset's name: the first part of its samples' ids."""
    modalities: tuple[str, ...]
    """What every sample has, in this order; () is text alone. If the attribute `media` is
    `listed`, what samples may have: each lists its media in its `.json`."""
    text: tuple[str, ...]
    """Which of `.txt` and `.json` every sample has."""
    licence: str
    source: str
    """What made the dataset (`toyworld`, `folder`, `index`)."""
    shards: tuple[ShardInfo, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Anything else about the dataset (of the toy world: its attributes and their values)."""

    @property
    def lists_media(self) -> bool:
        """Whether each sample lists its media, which may differ from sample to sample."""
        return self.attributes.get("media") == "listed"

    def to_bytes(self) -> bytes:
        """Make the JSON without checksum, one shard a line: what a fingerprint is made of.

        Equal manifests have equal bytes.
        """
        return self._make_json() + b"\n}\n"

    def to_file(self) -> bytes:
        """Make the bytes of the file: the same JSON, and its checksum as the last key."""
        return add_checksum(self._make_json())

    def _make_json(self) -> bytes:
        head = {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "modalities": list(self.modalities),
            "text": list(self.text),
            "licence": self.licence,
            "source": self.source,
            "attributes": dict(self.attributes),
        }
        lines = [
            f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False, sort_keys=True)}"
            for k, v in head.items()
        ]
        shards = ",\n".join("    " + json.dumps(asdict(s), ensure_ascii=False) for s in self.shards)
        lines.append(f'  "shards": [\n{shards}\n  ]')
        return ("{\n" + ",\n".join(lines)).encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: Path | str) -> Manifest:
        """Parse and check a manifest; `where` is its path or URL for messages.

        Raises:
            UsageError: it is not a manifest, has another version, was changed after it was
                written, or lists what no dataset can have: a path outside its folder, a shard
                twice, a size below 0.
        """
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise _make_manifest_error(
                where, f"it cannot be read ({type(error).__name__}: {error})"
            ) from error
        if not isinstance(raw, dict):
            raise _make_manifest_error(where, "it is not a JSON object")
        if raw.get("format") != FORMAT:
            raise _make_manifest_error(
                where, f"its format is {raw.get('format')!r:.80}, not {FORMAT!r}"
            )
        if raw.get("version") != VERSION or isinstance(raw["version"], bool):
            raise _make_manifest_error(
                where,
                f"its version is {raw.get('version')!r:.80}, this program reads {VERSION}",
            )
        if _CHECKSUM in raw:
            _check_checksum(data, raw[_CHECKSUM], where)
        return cls(
            _check_dataset_name(raw.get("name"), where),
            _get_words(raw, "modalities", where),
            _get_words(raw, "text", where, TEXT_EXTENSIONS),
            _get_text(raw, "licence", where),
            _get_text(raw, "source", where),
            _make_shards(raw.get("shards"), where),
            _get_attributes(raw, where),
        )


def add_checksum(json_without_end: bytes) -> bytes:
    """Append the checksum to the JSON of a manifest that lacks its closing brace."""
    digest = hashlib.sha256(json_without_end).hexdigest()
    return json_without_end + f'{_LAST_LINE}{digest}"\n}}\n'.encode()


def _check_checksum(data: bytes, said: object, where: Path | str) -> None:
    body, line, _ = data.rpartition(_LAST_LINE.encode())
    found = hashlib.sha256(body).hexdigest()
    if not line or found != said:
        raise UsageError(
            f"{where}: it was changed after it was written: its checksum is {said!r:.20}, and its "
            f"bytes have {found[:16]}...",
            "a damaged manifest may name other samples than the dataset has.",
            'restore it from a copy; if you changed it knowingly, remove its last key "checksum".',
        )


def _check_dataset_name(name: Any, where: Path | str) -> str:
    try:
        check_name(name)
    except UsageError as error:
        raise _make_manifest_error(where, error.what.removesuffix(".")) from error
    return str(name)


def _get_text(raw: Mapping[str, Any], key: str, where: Path | str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not _is_encodable(value):
        raise _make_manifest_error(where, f"its {key} is {value!r:.80}, not a text")
    return value


def _is_encodable(value: Any) -> bool:
    """Check that a value can be written again as UTF-8 JSON."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return False
    return True


def _get_words(
    raw: Mapping[str, Any], key: str, where: Path | str, known: Sequence[str] | None = None
) -> tuple[str, ...]:
    value = raw.get(key)
    if (
        not isinstance(value, list)
        or not all(isinstance(word, str) and word.isprintable() for word in value)
        or len(set(value)) != len(value)
        or (known is not None and not set(value) <= set(known))
    ):
        some = f" of {', '.join(known)}" if known else ""
        raise _make_manifest_error(where, f"its {key} is {value!r:.80}, not a list of names{some}")
    return tuple(value)


def _get_attributes(raw: Mapping[str, Any], where: Path | str) -> Mapping[str, Any]:
    value = raw.get("attributes", {})
    if not isinstance(value, dict) or not _is_encodable(value):
        raise _make_manifest_error(where, f"its attributes are {value!r:.80}, not an object")
    return value


def _make_shards(listed: Any, where: Path | str) -> tuple[ShardInfo, ...]:
    """Check the list of shards. All checks run over columns: there may be 41,400 shards."""
    if not isinstance(listed, list):
        raise _make_manifest_error(where, f"its shards are {listed!r:.80}, not a list")
    try:
        shards = tuple(ShardInfo(**shard) for shard in listed)
    except TypeError as error:
        raise _make_manifest_error(
            where, f"a shard has not exactly the keys path, split, samples, bytes, sha256 ({error})"
        ) from error
    for shard in shards:
        fault = _find_shard_fault(shard)
        if fault:
            raise _make_manifest_error(where, f"shard {shard.path!r:.120}: {fault}")
    bad = find_bad_shard_path(shard.path for shard in shards)
    if bad is not None:
        raise _make_manifest_error(
            where,
            f"shard {bad!r:.120}: its path does not name a .tar inside the dataset's folder",
        )
    names = {get_shard_name(shard.path): shard for shard in reversed(shards)}
    if len(names) < len(shards):
        twice = next(s for s in shards if names[get_shard_name(s.path)] is not s)
        raise _make_manifest_error(where, f"it lists the shard {twice.name!r:.120} twice")
    return shards


def _find_shard_fault(shard: ShardInfo) -> str:
    """Say what is wrong with the values of a shard; "" if nothing is."""
    digest = shard.sha256
    if type(shard.path) is not str or type(shard.split) is not str or type(digest) is not str:
        return "path, split and sha256 must be texts"
    if type(shard.samples) is not int or type(shard.bytes) is not int:
        return f"samples={shard.samples!r:.40}, bytes={shard.bytes!r:.40}: they must be numbers"
    if not (0 <= shard.samples < _MOST and 0 <= shard.bytes < _MOST):
        return f"samples={shard.samples!r:.40}, bytes={shard.bytes!r:.40}: out of range"
    if len(digest) != 64 or not _HEX.issuperset(digest):
        return f"sha256={digest!r:.80} is not 64 hex digits"
    if not shard.split or not shard.split.isprintable():
        return f"split={shard.split!r:.80} is not a name"
    return ""


def _make_manifest_error(where: Path | str, how: str) -> UsageError:
    return UsageError(
        f"{where}: {how}.",
        "the manifest says which shards the dataset has.",
        "restore it, build the dataset again, or use the program version that made it.",
    )
