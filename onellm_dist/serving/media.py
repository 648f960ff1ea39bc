"""The files of a question as model inputs, decoded where a broken one can do no harm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.logging import get_logger
from onellm_dist.common.workers.samples import SampleFunction, SampleLimits, SamplePool
from onellm_dist.common.workers.sandbox import decoding, get_data_bytes
from onellm_dist.common.workers.words import PoolWords
from onellm_dist.modalities import Part, get_modality
from onellm_dist.modalities.base import Modality
from onellm_dist.modalities.files import read_file_spans
from onellm_dist.modalities.library_faults import translate_errors

if TYPE_CHECKING:
    import torch

_log = get_logger(__name__)
_MOST_READ = 500
"""Media that one process reads: what its decoders leak ends with it."""
_MOST_KEPT = 256 << 20
"""Bytes that it may hold beyond its parent, which has no media."""
_WORDS = PoolWords(
    worker="reading process",
    result="file",
    parent="command",
    seconds="the limit of a file",
    megabytes="the limit of a file",
    fewer="close other programs",
)


class _File(NamedTuple):
    modality: Modality
    path: Path
    most: int
    """The most spans it may take."""


class GivenFiles(NamedTuple):
    """A medium whose files came with a request."""

    modality: str
    files: Mapping[str, bytes]
    """The modality's part -> the bytes of its file."""
    most: int = 1
    """The most spans it may take."""
    names: Mapping[str, str] | None = None
    """The modality's part -> what its sender calls the file."""


def read_files(
    files: Sequence[tuple[str, Path]], limits: SampleLimits | None = None
) -> dict[str, torch.Tensor]:
    """Read files of different modalities as model inputs, with the evaluation transforms.

    Args:
        files: (modality, file) pairs.
        limits: the time and the memory that a file may take; default: those of training's recipes.

    Returns:
        Modality to [1, *value_shape] fp32.

    Raises:
        UsageError: a file or a modality does not exist.
        SampleError: a file cannot be decoded within its limits; the message begins with its name.
    """
    return dict(read_media(files, {}, limits))


def read_media(
    files: Sequence[tuple[str, Path]],
    spans: Mapping[str, int],
    limits: SampleLimits | None = None,
) -> list[tuple[str, torch.Tensor]]:
    """Read any files as model inputs, with the evaluation transforms.

    Args:
        files: (modality, file) pairs.
        spans: modality to the most spans that its files may take together; default: one each.
        limits: as of `read_files`.

    Returns:
        Modality and [spans, *value_shape] fp32 of each file.

    Raises:
        UsageError: as of `read_files`.
        SampleError: as of `read_files`.
    """
    counts = Counter(name for name, _ in files)
    opened = [_File(get_modality(n), path, spans.get(n, 1) // counts[n]) for n, path in files]
    for modality, path, _ in opened:
        if not path.is_file():
            raise UsageError(
                f"--{modality.name} {path}: no such file",
                "there is nothing to read.",
                "check the path.",
            )
    found: list[tuple[str, torch.Tensor]] = []
    if not opened:
        return found
    function = SampleFunction[_File, tuple["torch.Tensor", list[str]]](
        lambda file: read_file_spans(*file), _refuse, lambda file: str(file.path)
    )
    with closing(SamplePool(function, _WORDS, limits or SampleLimits())) as pool:
        for file, (values, notes) in zip(opened, pool.map(opened), strict=True):
            found.append((file.modality.name, values))
            for note in notes:
                _log.warning("%s", note)
    return found


def _refuse(file: _File, reason: str) -> tuple[torch.Tensor, list[str]]:
    raise SampleError(f"{file.path}: its decoder failed: {reason}")


def read_given_files(
    media: Sequence[GivenFiles], limits: SampleLimits | None = None, *, first: int = 1
) -> list[torch.Tensor]:
    """Read media from the bytes of their files, with the evaluation transforms.

    Args:
        media: the media.
        limits: the time and the memory that a medium may take; default: those of training's
            recipes.
        first: the place of the first one in its request, for messages.

    Returns:
        [spans, *value_shape] fp32 of each.

    Raises:
        SampleError: a medium cannot be decoded within its limits; the message begins with its
            modality and the names of its files, or its place.
    """
    with closing(GivenFilesReader(limits or SampleLimits())) as reader:
        return reader.read(media, first=first)


class GivenFilesReader:
    """Reads media from the bytes of their files, in a process that is kept for the next ones.

    Starting one takes longer than decoding most media.

    Args:
        limits: the time and the memory that a medium may take.
    """

    def __init__(self, limits: SampleLimits) -> None:
        function = SampleFunction[tuple[int, GivenFiles], _DecodedFiles](
            _read_given, _refuse_given, lambda medium: _name_given(*medium)
        )
        self._pool = SamplePool(function, _WORDS, limits)
        self._left = _MOST_READ

    def read(self, media: Sequence[GivenFiles], *, first: int = 1) -> list[torch.Tensor]:
        """Read media, with the evaluation transforms.

        Args:
            media: the media.
            first: the place of the first one in its request, for messages.

        Returns:
            [spans, *value_shape] of each.

        Raises:
            SampleError: as of `read_given_files`.
        """
        found = list(self._pool.map(list(enumerate(media, start=first))))
        self._left -= len(found)
        most = get_data_bytes() + _MOST_KEPT
        if self._left <= 0 or any(decoded.process_bytes > most for decoded in found):
            self.close()  # what the process still holds is given back
        return [decoded.values for decoded in found]

    def close(self) -> None:
        """End the process; the next medium starts another."""
        self._pool.close()
        self._left = _MOST_READ


class _DecodedFiles(NamedTuple):
    values: torch.Tensor
    process_bytes: int
    """Memory of the process that decoded them, which it may not give back."""


def _read_given(medium: tuple[int, GivenFiles]) -> _DecodedFiles:
    import numpy as np
    import torch

    number, given = medium
    modality = get_modality(given.modality)
    roles = {**modality.required_parts, **modality.optional_parts}
    unknown = sorted(given.files.keys() - roles.keys())
    missing = sorted(modality.required_parts.keys() - given.files.keys())
    if unknown or missing:
        raise SampleError(
            f"{_name_given(number, given)}: "
            + (f"it lacks {', '.join(missing)}" if missing else f"it has {', '.join(unknown)}"),
            f"it is read from {' and '.join(modality.required_parts)}.",
            "send its files by the names of these parts.",
        )
    # The bytes decide how they are read, not the extension.
    parts = {role: Part(roles[role][0], data) for role, data in given.files.items()}
    try:
        with decoding(), translate_errors(modality.name):
            spans = (
                modality.count_spans(modality.measure(parts), given.most) if given.most > 1 else 1
            )
            rng = np.random.default_rng(0)
            found = modality.read_spans(parts, {}, spans=spans, train=False, rng=rng)
            values = torch.stack(found)
        return _DecodedFiles(values, get_data_bytes())
    except SampleError as error:
        # Files are read under names that were made up here.
        names = given.names or {}
        own = {
            f".{part.extension}": names.get(role, f"its {role} file")
            for role, part in parts.items()
        }
        # All at once: a name that was put in may have a made-up one in it, as x.jpg has .jpg.
        made_up = "|".join(map(re.escape, sorted(own, key=len, reverse=True)))
        what = re.sub(rf"(?:{made_up})(?!\w)", lambda found: own[found.group()], error.what)
        raise SampleError(f"{_name_given(number, given)}: {what}", error.why, error.do) from error


def _name_given(number: int, given: GivenFiles) -> str:
    if given.names:
        return f"{given.modality} {', '.join(given.names.values())}"
    return f"medium {number} ({given.modality})"


def _refuse_given(medium: tuple[int, GivenFiles], reason: str) -> _DecodedFiles:
    raise SampleError(
        f"{_name_given(*medium)}: {reason}", "it is not decoded a third time.", "send another."
    )
