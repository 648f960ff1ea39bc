"""Two-second windows of Ego4D's inertial recordings, cut and resampled once, when shards are built."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Part
from onellm_dist.modalities.imu import MODALITY, cut_window
from onellm_dist.modalities.io.imu import ImuRecording, read_recording
from onellm_dist.shards.sources.base import BadSampleError
from onellm_dist.shards.sources.readers.media_files import get_write_stamp

Recorded = tuple[Path, Path | None]
"""A recording and, of imu2clip's, its timestamps."""
_FOLDERS = ("", "v2/processed_imu/", "processed_imu/", "v2/imu/", "imu/")


@dataclass(frozen=True)
class CutImuWindow:
    """The window as `.npy` [6, 400] fp32: accelerometer xyz, gyroscope xyz, 200 Hz; as many zeros at the end as samples are missing."""

    recording: Path
    """Ego4D's `<uid>.csv`, or imu2clip's `<uid>.npy`."""
    timestamps: Path | None
    """imu2clip's `<uid>_timestamps.npy`."""
    start: float
    """Seconds of the video."""
    end: float
    min_samples: int

    def read_bytes(self) -> bytes:
        """Cuts and resamples as the modality does.

        Raises:
            BadSampleError: the recording cannot be read, or has too few samples there.
        """
        times = self.timestamps
        recording = _recording(
            self.recording,
            times,
            get_write_stamp(self.recording),
            0 if times is None else get_write_stamp(times),
        )
        if isinstance(recording, str):
            raise BadSampleError(recording)
        assert recording.times is not None
        try:
            window = cut_window(
                recording, recording.times, {"window_start": self.start, "window_end": self.end}
            )
            count = window.signal.shape[1]
            if count < self.min_samples:
                raise BadSampleError(
                    f"too few samples: the window {self.start:g} to {self.end:g} s has {count}, and min_samples={self.min_samples}"
                )
            values = MODALITY.transform(window, train=False, rng=np.random.default_rng(0)).numpy()
        except BadSampleError:
            raise
        except SampleError as error:
            raise BadSampleError(f"no usable window: {error.what}") from error
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(values))
        return buffer.getvalue()


@lru_cache(maxsize=2)
def _recording(
    path: Path, timestamps: Path | None, path_stamp: int, times_stamp: int
) -> ImuRecording | str:
    """A video's whole recording (1 hour: 35 MB), or why it cannot be used; its windows follow each other in the plan."""
    try:
        times = Part("timestamps.npy", timestamps.read_bytes()) if timestamps is not None else None
        found = read_recording(Part(f"imu{path.suffix}", path.read_bytes()), times)
    except SampleError as error:
        return f"unreadable recording: {path.name}: {error.what}"
    if found.times is None:
        return (
            f"unreadable recording: {path.name} has no timestamps (column canonical_timestamp_ms)"
        )
    if not len(found.times):
        return f"no canonical times: no row of {path.name} lies within the video"
    return found


def find_recording(folder: Path, uid: str) -> Recorded | None:
    """(recording, timestamps) of a video below a folder; None: it has none.

    imu2clip's pair of `.npy` goes before the raw `.csv`: it is read in a tenth of the time.
    """
    for place in _FOLDERS:
        signal, times = folder / f"{place}{uid}.npy", folder / f"{place}{uid}_timestamps.npy"
        if signal.is_file() and times.is_file():
            return signal, times
    for place in _FOLDERS:
        table = folder / f"{place}{uid}.csv"
        if table.is_file():
            return table, None
    return None
