"""Folders of media with captions in side files, and the naming rules of folders.

A sample is all files of one folder with the same stem: `cats/01.jpg` and `cats/01.txt`, or `a.jpg`,
`a.depth.png` and `a.json`. The extension of a file is the longest one that any modality knows and
that the lower-cased name ends with (`depth.png` before `png`). The rest of the name is the stem,
and may contain dots.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onellm_dist.common.errors import SampleError
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.modalities import get_modality
from onellm_dist.shards.format.names import (
    get_modality_parts,
    infer_modalities,
    make_safe_key,
    split_file_name,
)
from onellm_dist.shards.sources.base import RawSample


def select_parts(
    found: Mapping[str, Path], modalities: Sequence[str]
) -> tuple[dict[str, Path], str | None]:
    """Select the files that the modalities read.

    Args:
        found: extension to file.
        modalities: names of modalities.

    Returns:
        Extension to selected file, and what is wrong (None: nothing).
    """
    chosen: dict[str, Path] = {}
    for name in modalities:
        modality = get_modality(name)
        for role, accepted in get_modality_parts(modality).items():
            fitting = [e for e in accepted if e in found]
            if len(fitting) > 1:
                names = " and ".join(found[e].name for e in fitting)
                return chosen, f"ambiguous: {names} are both a {role} file for {name}"
            chosen.update({e: found[e] for e in fitting})
        try:
            modality.match(set(found))
        except SampleError as error:
            return chosen, f"missing part: {error.what}"
    return chosen, None


@dataclass
class FileGroups:
    """The files of a folder, grouped by stem."""

    files: dict[str, dict[str, Path]] = field(default_factory=dict)
    """Stem (relative to the folder, with `/`) to extension to file."""
    clashes: dict[str, str] = field(default_factory=dict)
    """Stem to a message about two files that would be the same part."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Suffix to the number of files that no modality reads."""


def group_files(root: Path, skip: frozenset[Path] = frozenset()) -> FileGroups:
    """Group the files of a folder and its subfolders by stem.

    Hidden files and folders are left out; symbolic links are followed.

    Args:
        root: the folder.
        skip: files to leave out.
    """
    groups, seen = FileGroups(), set[str]()
    for folder, folders, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(
            f
            for f in folders
            if not f.startswith(".") and os.path.realpath(os.path.join(folder, f)) not in seen
        )
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith(".") or path in skip:
                continue
            split = split_file_name(name)
            if split is None:
                groups.ignored[path.suffix.lower() or name] += 1
                continue
            stem = Path(folder).relative_to(root).joinpath(split[0]).as_posix()
            group = groups.files.setdefault(stem, {})
            if split[1] in group:
                groups.clashes[stem] = (
                    f"ambiguous: {group[split[1]].name} and {name} are the same part"
                )
            group[split[1]] = path
    return groups


def find_side_file_samples(
    root: Path, wanted: tuple[str, ...] | None
) -> tuple[tuple[str, ...], list[RawSample], list[str]]:
    """Find the samples of a folder whose captions are in side files.

    Args:
        root: the folder.
        wanted: the modalities; None to infer them.

    Returns:
        Modalities, raw samples sorted by key, and notes on files that were ignored.
    """
    groups = group_files(root)
    media = {
        stem: {e: p for e, p in files.items() if e not in TEXT_EXTENSIONS}
        for stem, files in groups.files.items()
    }
    if wanted is None:
        wanted = infer_modalities(Counter(frozenset(m) for m in media.values() if m), root)
    useful = {
        e
        for name in wanted
        for accepted in get_modality_parts(get_modality(name)).values()
        for e in accepted
    }
    raw_samples = []
    for stem, files in groups.files.items():
        if wanted and media[stem] and not media[stem].keys() & useful:
            groups.ignored.update(f".{e}" for e in files)
            continue
        raw_samples.append(_make_raw_sample(stem, files, wanted, groups.clashes.get(stem)))
    notes = (
        [f"ignored: {', '.join(f'{n} x {s}' for s, n in groups.ignored.most_common())}"]
        if groups.ignored
        else []
    )
    return (
        wanted,
        sorted(raw_samples, key=lambda c: (os.fsencode(c.key), os.fsencode(c.where))),
        notes,
    )


def _make_raw_sample(
    stem: str, files: Mapping[str, Path], modalities: Sequence[str], clash: str | None
) -> RawSample:
    texts = {e: files[e] for e in TEXT_EXTENSIONS if e in files}
    media, problem = select_parts(files, modalities)
    where = str(next(iter((media or texts or files).values())))
    if clash is not None:
        problem = clash
    elif modalities and files.keys() <= set(TEXT_EXTENSIONS):
        problem = "caption without media: no media file has this name"
    elif not texts:
        problem = (
            f"no caption: neither {Path(stem).name}.txt nor {Path(stem).name}.json lies beside it"
        )
    return RawSample(make_safe_key(stem), where, {**media, **texts}, problem=problem)
