"""The columns of an index that say which media its samples have, and how large they are.

They are there for datasets that list their media, and where `onellm shards index --media` added
them. An index without them is as it was before they existed, byte by byte. Shapes: n samples and M
media of one shard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onellm_dist.common.media_size import MediaSize, SampleMedium

MEDIA_COLUMNS = {
    "media_start": "<u8",
    "media_modality": "<u2",
    "media_prefix": "<u2",
    "media_width": "<u4",
    "media_height": "<u4",
    "media_frames": "<u4",
    "media_seconds": "<f8",
}
"""The columns and their types: the first medium of each sample (and M), then M values each."""
_LARGEST = (1 << 32) - 1


class MediaFaultError(ValueError):
    """What is wrong with these columns."""


class MediaColumns:
    """The media of a shard's samples.

    Args:
        columns: MEDIA_COLUMNS by name.
        modalities: what `media_modality` counts.
        prefixes: what `media_prefix` counts.
    """

    def __init__(
        self,
        columns: Mapping[str, NDArray[Any]],
        modalities: Sequence[str],
        prefixes: Sequence[str],
    ) -> None:
        self.starts = columns["media_start"].astype(np.int64)
        """[n + 1] first medium of each sample, and M."""
        self.modality = columns["media_modality"]
        """[M] index into `modalities`."""
        self.modalities = tuple(modalities)
        self._prefixes = tuple(prefixes)
        self._columns = columns

    def get(self, row: int) -> tuple[SampleMedium, ...]:
        """Return the media of a sample, in order."""
        first, last = self.starts[row : row + 2].tolist()
        c = self._columns
        return tuple(
            SampleMedium(
                self.modalities[int(c["media_modality"][i])],
                self._prefixes[int(c["media_prefix"][i])],
                self.get_size(i),
            )
            for i in range(first, last)
        )

    def get_size(self, number: int) -> MediaSize:
        """Return the size of a medium by its number in the shard."""
        c = self._columns
        return MediaSize(
            int(c["media_width"][number]),
            int(c["media_height"][number]),
            int(c["media_frames"][number]),
            float(c["media_seconds"][number]),
        )


def make_media_columns(
    media: Sequence[Sequence[SampleMedium]],
) -> tuple[dict[str, NDArray[Any]], dict[str, list[str]]]:
    """Make the columns, and what the header says of them.

    Args:
        media: the media of each sample.
    """
    flat = [medium for sample in media for medium in sample]
    modalities = list(dict.fromkeys(m.modality for m in flat))
    prefixes = list(dict.fromkeys(m.prefix for m in flat))
    number = {name: i for i, name in enumerate(modalities)}
    place = {prefix: i for i, prefix in enumerate(prefixes)}
    starts = np.concatenate([[0], np.cumsum([len(sample) for sample in media])])
    values = {
        "media_start": starts,
        "media_modality": [number[m.modality] for m in flat],
        "media_prefix": [place[m.prefix] for m in flat],
        "media_width": [min(m.size.width, _LARGEST) for m in flat],
        "media_height": [min(m.size.height, _LARGEST) for m in flat],
        "media_frames": [min(m.size.frames, _LARGEST) for m in flat],
        "media_seconds": [m.size.seconds for m in flat],
    }
    columns = {name: np.array(values[name], dtype) for name, dtype in MEDIA_COLUMNS.items()}
    return columns, {"modalities": modalities, "prefixes": prefixes}


def open_media_columns(
    columns: Mapping[str, NDArray[Any]], header: Any, samples: int
) -> MediaColumns | None:
    """Open and check the columns of an index; None: it has none.

    Args:
        columns: all columns of the index.
        header: what its header says of the media; None: nothing.
        samples: n.

    Raises:
        MediaFaultError: they contradict each other, or the header.
    """
    if header is None:
        return None
    missing = [name for name in MEDIA_COLUMNS if name not in columns]
    wrong = [n for n, d in MEDIA_COLUMNS.items() if n in columns and columns[n].dtype.str != d]
    if missing or wrong:
        raise MediaFaultError(f"its column {[*missing, *wrong][0]} is missing or of another type")
    said: dict[str, Any] = header if isinstance(header, dict) else {}
    names: list[Any] = [said.get(key) for key in ("modalities", "prefixes")]
    if not all(isinstance(n, list) and all(isinstance(x, str) for x in n) for n in names):
        raise MediaFaultError("its header does not name the modalities and prefixes of its media")
    starts, media = columns["media_start"], len(columns["media_modality"])
    if len(starts) != samples + 1 or starts[0] != 0 or starts[-1] != media:
        raise MediaFaultError("its column media_start does not fit its samples")
    if (starts[1:] < starts[:-1]).any():
        raise MediaFaultError("its column media_start falls")
    if any(len(columns[name]) != media for name in MEDIA_COLUMNS if name != "media_start"):
        raise MediaFaultError("its columns of media have different lengths")
    for key, known in (("media_modality", names[0]), ("media_prefix", names[1])):
        if media and int(columns[key].max()) >= len(known):
            raise MediaFaultError(f"its column {key} has a value that the header does not name")
    seconds = columns["media_seconds"]
    if not (np.isfinite(seconds) & (seconds >= 0)).all():
        raise MediaFaultError("its column media_seconds has a length that is not a time")
    return MediaColumns(columns, names[0], names[1])
