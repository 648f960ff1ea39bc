"""The parts of a sample as they lie in an open tar, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import BinaryIO

from onellm_dist.shards.format.index import PartLocation


class TarParts(Mapping[str, bytes]):
    """Extension to content.

    Args:
        file: the tar.
        locations: where the parts lie.
        most: bytes that are read of a part; None: all.
    """

    def __init__(
        self, file: BinaryIO, locations: Mapping[str, PartLocation], most: int | None = None
    ) -> None:
        self._file = file
        self._locations = locations
        self._most = most

    def __getitem__(self, extension: str) -> bytes:
        location = self._locations[extension]
        self._file.seek(location.offset)
        size = location.size if self._most is None else min(location.size, self._most)
        return self._file.read(size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._locations)

    def __len__(self) -> int:
        return len(self._locations)

    def cut(self, most: int) -> TarParts:
        """Limit each part to its first `most` bytes."""
        return TarParts(self._file, self._locations, most)
