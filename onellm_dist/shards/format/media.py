"""The media of a sample: numbered parts (`0.jpg`, `1.wav`), and what its `.json` says of them.

A sample of a dataset that lists its media (`Dataset.lists_media`) has any number of media. The
parts of each begin with a number, its *prefix*: `0.jpg`, `1.depth.png` beside `1.jpg`. `media` in
the `.json` names their modalities in order, `["image", "depth"]`; an entry may be an object
instead, `{"modality": "imu", ...}`, whose other keys say how this medium is read, as the keys of
the `.json` do for all. Tars from elsewhere may lack `media`, and may have prefixes like `img0` or
`image_1`: the order is then that of the numbers, and the extensions decide on the modality.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import SampleError
from onellm_dist.common.media_size import MediaSize, SampleMedium
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.modalities import Modality, Part, get_modality
from onellm_dist.modalities.library_faults import translate_errors
from onellm_dist.shards.format.names import find_readable_modalities, get_known_extensions

LISTED = {"media": "listed"}
"""Attribute of the manifest of a dataset whose samples list their media."""
_PREFIX = re.compile(r"([a-z]*_?)(\d{1,5})\.(.+)")


def split_prefix(extension: str) -> tuple[str, str]:
    """Split the extension of a part into its prefix (empty: it has none) and what it is without."""
    match = _PREFIX.fullmatch(extension)
    if match is None or match[3] not in get_known_extensions() - set(TEXT_EXTENSIONS):
        return "", extension
    return match[1] + match[2], match[3]


def make_numbered_parts(
    media: Iterable[tuple[str, Mapping[str, Any]]],
) -> tuple[dict[str, Any], list[str]]:
    """Number the parts of a sample's media, for a source.

    Args:
        media: modality, and extension to content, of each medium in order.

    Returns:
        The parts, and the value of `media` in the `.json`.
    """
    parts: dict[str, Any] = {}
    names: list[str] = []
    for number, (modality, own) in enumerate(media):
        parts.update({f"{number}.{extension}": content for extension, content in own.items()})
        names.append(modality)
    return parts, names


def list_media(
    extensions: Collection[str], meta: Mapping[str, Any], modalities: Collection[str]
) -> list[SampleMedium]:
    """List the media of a sample in order, without their sizes.

    Args:
        extensions: those of all its parts.
        meta: its `.json`.
        modalities: what samples of the dataset may have.

    Raises:
        SampleError: parts and `media` do not fit each other, or a medium has no known modality.
    """
    prefixes: dict[str, set[str]] = {}
    for extension in sorted(set(extensions) - set(TEXT_EXTENSIONS)):
        prefix, own = split_prefix(extension)
        prefixes.setdefault(prefix, set()).add(own)
    listed = read_listed_modalities(meta)
    if not set(prefixes) - {""}:
        return _list_unnumbered(prefixes.get("", set()), listed, modalities)
    plain = prefixes.pop("", set())
    if plain & get_known_extensions():
        raise SampleError(
            f"it has numbered media and .{min(plain)} beside them",
            "the order of its media is not known.",
            "number all of its media: 0.jpg, 1.jpg.",
        )
    order = sorted(prefixes, key=lambda prefix: (int(re.sub(r"\D", "", prefix)), prefix))
    if listed is not None and len(listed) != len(order):
        raise _make_count_error(listed, len(order))
    names = listed or [_infer_modality(prefix, prefixes[prefix], modalities) for prefix in order]
    for name, prefix in zip(names, order, strict=True):
        _check_modality(name, prefix, prefixes[prefix], modalities)
    return [SampleMedium(name, prefix) for name, prefix in zip(names, order, strict=True)]


def read_listed_modalities(meta: Mapping[str, Any]) -> list[str] | None:
    """Read the modalities that `media` of a `.json` names; None: it does not list media."""
    media = meta.get("media")
    if not isinstance(media, list):
        return None
    return [str(m.get("modality")) if isinstance(m, dict) else str(m) for m in media]


def get_medium_meta(meta: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    """Return what holds for one medium of a sample: its `.json`, and its own entry of `media`."""
    media = meta.get("media")
    own = media[number] if isinstance(media, list) and number < len(media) else None
    return {**meta, **own} if isinstance(own, dict) else meta


def match_medium(modality: str, prefix: str, extensions: Collection[str]) -> dict[str, str]:
    """Return role to extension of the parts of one medium.

    Raises:
        SampleError: a required part is missing.
    """
    prefix = f"{prefix}." if prefix else ""
    own = {e.removeprefix(prefix) for e in extensions if e.startswith(prefix)}
    found = get_modality(modality).match(own)
    return {role: prefix + extension for role, extension in found.items()}


def get_medium_parts(medium: SampleMedium, parts: Mapping[str, bytes | Part]) -> dict[str, Part]:
    """Return role to part of one medium, the parts without their prefix.

    Raises:
        SampleError: a required part is missing.
    """
    found = {}
    for role, extension in match_medium(medium.modality, medium.prefix, parts).items():
        content = parts[extension]
        data = content.data if isinstance(content, Part) else content
        found[role] = Part(split_prefix(extension)[1] if medium.prefix else extension, data)
    return found


def measure_media(
    parts: Mapping[str, bytes], modalities: Collection[str]
) -> tuple[SampleMedium, ...]:
    """List the media of a sample with the sizes that their headers state.

    Args:
        parts: all its parts, by extension.
        modalities: what samples of the dataset may have.

    Raises:
        SampleError: as of `list_media`.
    """
    media = list_media(parts, parse_meta(parts.get("json")), modalities)
    return tuple(m._replace(size=measure_medium(m, parts)) for m in media)


def measure_medium(medium: SampleMedium, parts: Mapping[str, bytes]) -> MediaSize:
    """Read the size of one medium from its header; zeros where the header cannot be read."""
    modality = get_modality(medium.modality)
    if type(modality).measure is Modality.measure:
        return MediaSize()
    try:
        with translate_errors(medium.modality):
            return modality.measure(get_medium_parts(medium, parts))
    except SampleError:
        return MediaSize()


def parse_meta(data: bytes | None) -> Mapping[str, Any]:
    """Parse a sample's `.json`; what is not an object says nothing."""
    try:
        meta = json.loads(data) if data is not None else {}
    except (ValueError, RecursionError):
        return {}
    return meta if isinstance(meta, dict) else {}


def _list_unnumbered(
    own: Collection[str], listed: Sequence[str] | None, modalities: Collection[str]
) -> list[SampleMedium]:
    """The media of a sample whose parts have no numbers: at most one of each modality."""
    if listed is not None:
        if listed and not own:
            raise _make_count_error(listed, 0)
        for name in listed:
            _check_modality(name, "", own, modalities)
        if len(set(listed)) < len(listed):
            raise _make_count_error(listed, len(set(listed)))
        return [SampleMedium(name) for name in listed]
    readable = [n for n in find_readable_modalities(own) if n in modalities]
    return [SampleMedium(name) for name in readable]


def _infer_modality(prefix: str, own: Collection[str], modalities: Collection[str]) -> str:
    found = [name for name in find_readable_modalities(own) if name in modalities]
    if len(found) != 1:
        parts = ", ".join(f".{prefix}.{e}" for e in sorted(own))
        raise SampleError(
            f"{parts}: {' or '.join(found) if found else 'media of no modality of the dataset'}",
            f"the dataset has {', '.join(modalities)}.",
            'name the media in order in the .json: "media": ["image", "audio"].',
        )
    return found[0]


def _check_modality(
    name: str, prefix: str, own: Collection[str], modalities: Collection[str]
) -> None:
    if name not in modalities:
        raise SampleError(
            f"its media name {name!r:.40}, which is not a modality of the dataset",
            f"the dataset has {', '.join(modalities) or 'none'}.",
            "name one of them, or build the dataset with this modality.",
        )
    try:
        get_modality(name).match(set(own))
    except SampleError as error:
        where = f"medium {prefix}: " if prefix else ""
        raise SampleError(f"{where}{error.what}", error.why, error.do) from error


def _make_count_error(listed: Sequence[str], parts: int) -> SampleError:
    return SampleError(
        f"its .json lists {format_count(len(listed), 'medium', 'media')} ({', '.join(listed)}), "
        f"and it has parts of {parts}",
        "texts would be shown with the wrong media.",
        "list each medium once, in the order of the numbers of its parts.",
    )
