"""Folders of media with captions in side files, and the naming rules of folders.

A sample is all files of one folder with the same stem: `cats/01.jpg` and `cats/01.txt`, or `a.jpg`,
`a.depth.png` and `a.json`. The extension of a file is the longest one that any modality knows and
that the lower-cased name ends with (`depth.png` before `png`). The rest of the name is the stem,
and may contain dots. A caption may also be named after the complete file (`01.jpg.txt`), and its
name may have the other Unicode form.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.common.hidden_files import is_hidden
from onellm_dist.common.sample_parts import TEXT_EXTENSIONS
from onellm_dist.common.turns import CONVERSATION_KEYS
from onellm_dist.modalities import get_modality
from onellm_dist.shards.format.names import (
    get_known_extensions,
    get_modality_parts,
    infer_modalities,
    make_safe_key,
    split_file_name,
)
from onellm_dist.shards.sources.base import RawSample
from onellm_dist.shards.sources.readers.listing import get_shown_suffix
from onellm_dist.shards.sources.readers.lost_tables import SUFFIXES, refuse_lost_tables
from onellm_dist.shards.sources.readers.named_files import compose
from onellm_dist.shards.sources.readers.part_selection import select_parts
from onellm_dist.shards.sources.readers.unique_keys import make_keys_unique

_LARGEST_META = 1 << 22
"""Bytes of a `.json` above which it is not a sample's."""
_OTHER_SOURCES = {
    ".parquet": "tables with media inside: onellm shards build parquet IN OUT",
    ".arrow": "a folder of datasets.save_to_disk: onellm shards build parquet IN OUT",
    ".tar": "tars: onellm shards index IN if they hold samples, or the source of their dataset",
    ".tar.gz": "compressed tars: unpack them (gunzip gives .tar)",
    ".tgz": "compressed tars: unpack them (gunzip gives .tar)",
    ".zip": "archives: unpack them",
}
"""Suffix to what to do with such files, where a folder has no media."""


@dataclass
class FileGroups:
    """The files of a folder, grouped by stem."""

    files: dict[str, dict[str, Path]] = field(default_factory=dict)
    """Stem (a path relative to the folder) to extension to file."""
    clashes: dict[str, str] = field(default_factory=dict)
    """Stem to why its files are ambiguous."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Suffix to the number of files that no modality knows, or that nothing uses."""
    hidden: int = 0
    """Hidden files and folders that were skipped."""
    tables: list[Path] = field(default_factory=list)
    """Files that may be tables of captions."""

    def get_media(self, stem: str) -> dict[str, Path]:
        """Return the files of a stem that are not text parts."""
        return {e: p for e, p in self.files[stem].items() if e not in TEXT_EXTENSIONS}

    def make_notes(self) -> list[str]:
        """Say what was passed over."""
        notes = []
        if self.ignored:
            listed = ", ".join(f"{n} x {s}" for s, n in self.ignored.most_common())
            notes.append(f"ignored: {listed}")
        if self.hidden:
            notes.append(f"hidden files and folders skipped: {self.hidden}")
        return notes


def group_files(root: Path, skip: Collection[Path] = ()) -> FileGroups:
    """Group the files below a folder by stem; hidden ones are left out.

    Symbolic links are followed.

    Args:
        root: the folder.
        skip: files to leave out.
    """
    groups, seen = FileGroups(), set[str]()
    for folder, folders, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        groups.hidden += sum(map(is_hidden, (*folders, *names)))
        folders[:] = sorted(
            f
            for f in folders
            if not is_hidden(f) and os.path.realpath(os.path.join(folder, f)) not in seen
        )
        for name in sorted(names):
            path = Path(folder, name)
            if is_hidden(name) or path in skip:
                continue
            split = split_file_name(name)
            if path.suffix.lower() in SUFFIXES:
                groups.tables.append(path)
            if split is None:
                groups.ignored[get_shown_suffix(name)] += 1
                continue
            stem = Path(folder).relative_to(root).joinpath(split[0]).as_posix()
            group = groups.files.setdefault(stem, {})
            if split[1] in group:
                groups.clashes[stem] = (
                    f"ambiguous: {group[split[1]].name} and {name} are the same part"
                )
            group[split[1]] = path
    _pair_other_spellings(groups)
    return groups


def _ignore_other_json(groups: FileGroups) -> None:
    """Ignore JSON files that belong to no medium and hold no caption, such as statistics."""
    for stem in [s for s, files in groups.files.items() if files.keys() == {"json"}]:
        if _holds_no_caption(groups.files[stem]["json"]):
            del groups.files[stem]
            groups.ignored[".json without a caption"] += 1


def _holds_no_caption(path: Path) -> bool:
    try:
        if path.stat().st_size > _LARGEST_META:
            return True
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(value, dict):
        return True
    return not {"caption", "captions", *CONVERSATION_KEYS} & value.keys()


def _pair_other_spellings(groups: FileGroups) -> None:
    """Join texts without media to the media that they are named after in another way.

    The other way is the complete file name, or the other Unicode form. Where several fit, nothing
    is joined.
    """
    media_stems: dict[str, list[str]] = defaultdict(list)
    for stem in groups.files:
        for file in groups.get_media(stem).values():
            folder = PurePosixPath(stem).parent
            for name in (compose(stem), compose((folder / file.name).as_posix())):
                if stem not in media_stems[name]:
                    media_stems[name].append(stem)
    lonely = [s for s, f in groups.files.items() if f.keys() <= set(TEXT_EXTENSIONS)]
    for stem in lonely:
        fitting = [m for m in media_stems.get(compose(stem), ()) if m != stem]
        if len(fitting) == 1 and not groups.files[fitting[0]].keys() & groups.files[stem].keys():
            groups.files[fitting[0]].update(groups.files.pop(stem))


def find_side_file_samples(
    root: Path, wanted: tuple[str, ...] | None, *, class_captions: bool = False
) -> tuple[tuple[str, ...], list[RawSample], list[str]]:
    """Find the samples of a folder whose captions are in side files.

    Args:
        root: the folder.
        wanted: the modalities; None to infer them.
        class_captions: whether the names of class folders are captions, if no sample has a text.

    Returns:
        Modalities, raw samples sorted by key, and notes on files that were ignored.

    Raises:
        UsageError: there are no media of a known modality, or of several; or no sample has a text,
            and the folders that they lie in name captions if the user says so.
    """
    groups = group_files(root)
    if wanted != ():
        _ignore_other_json(groups)
        if not class_captions and _has_media_alone(groups):
            refuse_lost_tables(root, groups.tables)
    media = {stem: groups.get_media(stem) for stem in groups.files}
    if wanted is None:
        _require_media(root, groups)
        wanted = infer_modalities(Counter(frozenset(m) for m in media.values() if m), root)
    stems = _select_stems(groups, media, wanted)
    classes = _find_classes(root, groups, stems, is_wanted=class_captions) if wanted else None
    safe = [make_safe_key(stem) for stem in stems]
    keys = make_keys_unique(safe, [k == s for k, s in zip(safe, stems, strict=True)])
    raw_samples = [
        _make_raw_sample(
            key,
            stem,
            groups.files[stem],
            wanted,
            groups.clashes.get(stem),
            None if classes is None else classes[stem],
        )
        for key, stem in zip(keys, stems, strict=True)
    ]
    notes = groups.make_notes()
    if classes is not None:
        names = ", ".join(sorted(set(classes.values())))
        notes.append(
            f"captions are the names of the folders ({names}), as class_captions=true says"
        )
    if renamed := sum(key != old for key, old in zip(keys, safe, strict=True)):
        notes.append(
            f"names that differ in dots alone: {format_count(renamed, 'key')} got a number"
        )
    return (
        wanted,
        sorted(raw_samples, key=lambda c: (os.fsencode(c.key), os.fsencode(c.where))),
        notes,
    )


def _has_media_alone(groups: FileGroups) -> bool:
    """Check that there are media, and that not one of them has a text."""
    with_media = [f.keys() for f in groups.files.values() if f.keys() - set(TEXT_EXTENSIONS)]
    return bool(with_media) and not any(f & set(TEXT_EXTENSIONS) for f in with_media)


def _select_stems(
    groups: FileGroups, media: Mapping[str, Mapping[str, Path]], wanted: Sequence[str]
) -> list[str]:
    """List the stems in their order, and count those whose media no modality of these reads."""
    useful = {
        e
        for name in wanted
        for accepted in get_modality_parts(get_modality(name)).values()
        for e in accepted
    }
    stems = []
    for stem, files in sorted(groups.files.items(), key=lambda item: os.fsencode(item[0])):
        if wanted and media[stem] and not media[stem].keys() & useful:
            groups.ignored.update(f".{e}" for e in files)
        else:
            stems.append(stem)
    return stems


def _require_media(root: Path, groups: FileGroups) -> None:
    """Refuse a folder in which no file is a medium, with a word about what lies there.

    Raises:
        UsageError: nothing there is a medium.
    """
    if any(groups.get_media(stem) for stem in groups.files):
        return
    seen = ", ".join(f"{n} x {s}" for s, n in groups.ignored.most_common(8))
    advice = [said for s, said in _OTHER_SOURCES.items() if groups.ignored[s]]
    raise UsageError(
        f"{root}: no file there is media of a known modality"
        f"{f' (there are {seen})' if seen else ''}.",
        "there is nothing to build from.",
        "; ".join(advice) + "."
        if advice
        else f"known extensions: {', '.join(sorted(get_known_extensions()))}.",
    )


def _find_classes(
    root: Path, groups: FileGroups, stems: Sequence[str], *, is_wanted: bool
) -> dict[str, str] | None:
    """Return stem to class if that is wanted; None: the samples have texts, or no classes.

    Raises:
        UsageError: no sample has a text, and their folders are classes or are none, whichever is
            not what the user says.
    """
    if not stems or any(set(TEXT_EXTENSIONS) & groups.files[stem].keys() for stem in stems):
        return None
    found = {stem: PurePosixPath(stem).parts for stem in stems}
    other = next((stem for stem, parts in found.items() if len(parts) != 2), None)
    if is_wanted and other is not None:
        raise UsageError(
            f"{root}: class_captions=true, and {other} lies in no class folder.",
            "a sample's caption would be the name of the one folder that it lies in (cat/1.jpg).",
            "move it there, put texts beside the media, or name a table: -o captions=FILE.",
        )
    if not is_wanted and other is None:
        names = textwrap.shorten(", ".join(sorted({p[0] for p in found.values()})), 120)
        raise UsageError(
            f"{root}: no sample has a caption; all lie in the folders {names}.",
            "names of folders are captions only if you say so.",
            "-o class_captions=true takes them as captions; else put texts beside the media "
            "(cat.jpg + cat.txt), or name a table: -o captions=FILE.",
        )
    return {stem: parts[0] for stem, parts in found.items()} if is_wanted else None


def _make_raw_sample(
    key: str,
    stem: str,
    files: Mapping[str, Path],
    modalities: Sequence[str],
    clash: str | None,
    caption: str | None,
) -> RawSample:
    texts = {e: files[e] for e in TEXT_EXTENSIONS if e in files}
    media, problem = select_parts(files, modalities)
    where = str(next(iter((media or texts or files).values())))
    if clash is not None:
        problem = clash
    elif modalities and files.keys() <= set(TEXT_EXTENSIONS):
        problem = "caption without media: no media file has this name"
    elif not texts and caption is None:
        problem = (
            f"no caption: neither {Path(stem).name}.txt nor {Path(stem).name}.json lies beside it"
        )
    return RawSample(key, where, {**media, **texts}, caption, problem=problem)
