"""Finding a fingerprint among those of a benchmark, and n-grams of texts among its texts."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onellm_dist.shards.tools.fingerprints import MediaFingerprint, PictureFingerprint

HASH_BITS = 12
"""dHashes that differ in at most so many of 64 bits are candidates."""
SAME_PICTURE = 0.94
"""Correlation of small pictures from which they are one."""
SAME_SOUND = 0.8
"""Correlation of spectra from which two sounds are one."""
WORDS = 8
"""Words of an n-gram."""
_WORD = re.compile(r"\w+")
_COUNTS = np.array([bin(i).count("1") for i in range(1 << 16)], np.uint8)


@dataclass(frozen=True)
class MediaMatch:
    """A medium of a benchmark that a training sample contains."""

    place: int
    """Position of the medium among the benchmark's media."""
    how: str
    """`same bytes`, `picture 0.98`, `sound 0.91`."""


class MediaIndex:
    """The fingerprints of a benchmark's media.

    Args:
        fingerprints: one for each medium; None for those that cannot be read.
    """

    def __init__(self, fingerprints: Sequence[MediaFingerprint | None]) -> None:
        self._by_sum: dict[str, list[int]] = {}
        self._frames: list[int] = []
        owners, hashes, thumbnails, sounds = [], [], [], []
        self._sound_owners: list[int] = []
        for place, fingerprint in enumerate(fingerprints):
            if fingerprint is None:
                self._frames.append(0)
                continue
            for digest in fingerprint.sums.values():
                self._by_sum.setdefault(digest, []).append(place)
            self._frames.append(len(fingerprint.pictures))
            for picture in fingerprint.pictures:
                owners += [place] * len(picture.hashes)
                hashes.append(picture.hashes)
                thumbnails.append(picture.thumbnails)
            for sound in fingerprint.sounds:
                self._sound_owners.append(place)
                sounds.append(sound)
        self._owners = np.array(owners, np.int64)
        self._hashes = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        self._thumbnails = np.concatenate(thumbnails) if thumbnails else np.empty((0, 1))
        self._variants = len(hashes[0]) if hashes else 1
        self._sounds = np.stack(sounds) if sounds else np.empty((0, 1), np.float32)

    def find(self, fingerprint: MediaFingerprint) -> list[MediaMatch]:
        """The benchmark's media that a training sample contains, each once."""
        found: dict[int, str] = {}
        for digest in fingerprint.sums.values():
            for place in self._by_sum.get(digest, ()):
                found[place] = "same bytes"
        seen: dict[int, list[float]] = {}
        for picture in fingerprint.pictures:
            for place, likeness in self._find_picture(picture).items():
                seen.setdefault(place, []).append(likeness)
        for place, likenesses in seen.items():
            # of a video more than half of the frames must be there
            if 2 * len(likenesses) > min(self._frames[place], len(fingerprint.pictures)):
                found.setdefault(place, f"picture {max(likenesses):.2f}")
        for sound in fingerprint.sounds:
            likeness_of = self._sounds @ sound if len(self._sounds) else np.empty(0)
            for at in np.flatnonzero(likeness_of >= SAME_SOUND):
                found.setdefault(self._sound_owners[at], f"sound {likeness_of[at]:.2f}")
        return [MediaMatch(place, how) for place, how in sorted(found.items())]

    def _find_picture(self, picture: PictureFingerprint) -> dict[int, float]:
        """The whole picture among all variants, and its crops among the whole ones."""
        found: dict[int, float] = {}
        pairs = [(0, slice(None))]
        whole = slice(None, None, self._variants)
        pairs += [(variant, whole) for variant in range(1, len(picture.hashes))]
        for variant, rows in pairs:
            hashes, owners = self._hashes[rows], self._owners[rows]
            near = np.flatnonzero(count_bits(hashes ^ picture.hashes[variant]) <= HASH_BITS)
            likeness = self._thumbnails[rows][near] @ picture.thumbnails[variant]
            for at, alike in zip(near, likeness, strict=True):
                if alike >= SAME_PICTURE:
                    place = int(owners[at])
                    found[place] = max(found.get(place, 0.0), float(alike))
        return found


def count_bits(words: np.ndarray) -> np.ndarray:
    """The number of set bits of uint64 words."""
    counted: np.ndarray = _COUNTS[words[:, None].view(np.uint16)].sum(1)
    return counted


def list_words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return _WORD.findall(text.lower())


def make_ngrams(text: str) -> Iterator[bytes]:
    """Hashes of all runs of WORDS words."""
    words = list_words(text)
    for first in range(len(words) - WORDS + 1):
        run = " ".join(words[first : first + WORDS])
        yield hashlib.blake2b(run.encode("utf-8", "surrogatepass"), digest_size=8).digest()


class TextIndex:
    """The n-grams of a benchmark's texts.

    Args:
        texts: id of a question -> its texts.
    """

    def __init__(self, texts: Mapping[str, Iterable[str]]) -> None:
        self._owners: dict[bytes, list[str]] = {}
        for name, some in texts.items():
            for ngram in {n for text in some for n in make_ngrams(text)}:
                self._owners.setdefault(ngram, []).append(name)

    def find(self, texts: Iterable[str]) -> set[str]:
        """Ids of the questions of which a text has an n-gram."""
        return {
            name for text in texts for n in make_ngrams(text) for name in self._owners.get(n, ())
        }
