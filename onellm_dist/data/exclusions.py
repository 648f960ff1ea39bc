"""Samples that a user leaves out of a run: lists of samples and of whole shards.

A list has one entry a line: `dataset/shard/key` (the sample in every epoch), the same with `@epoch`
(one use of it), or `dataset/shard` (the whole shard). Lines that begin with `#` and empty lines are
skipped. A sample that is left out keeps its place with zero weight: every other sample stays where
it was, at any number of ranks.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import write_atomic

PREFIX = "excluded by "
"""Beginning of the reason of every sample that a list leaves out."""
SHOWN = 5


@dataclass(frozen=True)
class Exclusions:
    """The entries of some lists.

    Attributes:
        entries: sample, use of a sample, or shard -> the list that names it.
    """

    entries: Mapping[str, str] = field(default_factory=dict)

    def find(self, sample_id: str) -> str | None:
        """Why a sample is left out; None if it is not.

        Args:
            sample_id: `dataset/shard/key@epoch`.
        """
        if not self.entries:
            return None
        name = sample_id.rpartition("@")[0]
        shard = "/".join(name.split("/", 2)[:2])
        for entry in (sample_id, name, shard):
            if entry in self.entries:
                return f"{PREFIX}{self.entries[entry]}"
        return None


def read_exclusions(recipe_list: Path | None, *lists: Path) -> Exclusions:
    """Read lists; of an entry that several have, the first one counts.

    Args:
        recipe_list: the recipe's list; errors call it `data.exclude`.
        lists: others; errors call them by their paths.

    Raises:
        UsageError: a list cannot be read, or a line is not an entry.
    """
    named = [(path, str(path)) for path in lists]
    if recipe_list is not None:
        named.insert(0, (recipe_list, f"data.exclude={recipe_list}"))
    found: dict[str, str] = {}
    for path, name in named:
        for entry in read_entries(path, name):
            found.setdefault(entry, str(path))
    return Exclusions(found)


def read_entries(path: Path, name: str = "") -> list[str]:
    """The entries of one list, in order.

    Args:
        path: the list.
        name: what errors call it; default: its path.

    Raises:
        UsageError: it cannot be read, or a line is not an entry.
    """
    name = name or str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors begin with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{name}: the list of excluded samples cannot be read: {error}",
            "samples that it names would be trained on.",
            "make it a text file with one sample or shard a line.",
        ) from None
    lines = [(number, line.rstrip("\r")) for number, line in enumerate(text.split("\n"), 1)]
    entries = [(n, line) for n, line in lines if line.strip() and not line.startswith("#")]
    wrong = [number for number, line in entries if not all(line.rstrip("/").split("/", 2)[:2])]
    wrong += [number for number, line in entries if "/" not in line.rstrip("/")]
    if wrong:
        numbers = ", ".join(map(str, sorted(set(wrong))[:SHOWN]))
        raise UsageError(
            f"{name}: line {numbers} names no sample and no shard",
            "what it means to leave out would be trained on.",
            "write dataset/shard/key, or dataset/shard for a whole shard.",
        )
    return [line.rstrip("/") for _, line in entries]


def add_entries(path: Path, entries: Iterable[str]) -> Sequence[str]:
    """Add entries to a list, which is made if missing; return those that are new.

    Two processes may add at once: where the file system has locks, each waits for the other. A kill
    or a full disk leaves the list as it was.

    Raises:
        UsageError: the list cannot be read or written.
    """
    try:
        with path.with_name(f".{path.name}.lock").open("ab") as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            known = set(read_entries(path)) if path.exists() else set()
            new = [entry for entry in dict.fromkeys(entries) if entry not in known]
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            if text and not text.endswith("\n"):
                text += "\n"
            write_atomic(path, text + "".join(f"{entry}\n" for entry in new))
    except OSError as error:
        raise UsageError(
            f"{path} cannot be written: {error.strerror or error}",
            "the samples would be trained on again.",
            "make the folder writable, or write the list yourself and set data.exclude to it.",
        ) from None
    return new
