"""Two-second windows of Ego4D's inertial recordings.

They are cut and resampled once, when shards are built.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.workers.sandbox import decoding
from onellm_dist.modalities import Part
from onellm_dist.modalities.imu import MODALITY, cut_window
from onellm_dist.modalities.io.imu import UNIT_KEYS, ImuRecording, read_recording
from onellm_dist.shards.sources.base import BadSampleError, Option
from onellm_dist.shards.sources.readers.media_files import get_write_stamp

RecordingFiles = tuple[Path, Path | None]
"""A recording and, if imu2clip made it, its timestamps."""
_FOLDERS = ("", "v2/processed_imu/", "processed_imu/", "v2/imu/", "imu/")


IMU_UNITS_OPTION = Option(
    None,
    "the recordings' units if they are others than m/s^2, rad/s and ms, separated by commas: of "
    "the accelerometer (m/s^2, g, mg), the gyroscope (rad/s, deg/s, mdps) and time (s, ms, us, ns);"
    " one that is left empty is not stated: g,,s",
    separator=",",
)


def parse_imu_units(text: str | None) -> tuple[tuple[str, str], ...]:
    """Parse the option `imu_units` to keys of a sample's json and their values.

    Raises:
        UsageError: it is not three units, or one is not known.
    """
    units = [unit.strip() for unit in text.split(",")] if text is not None else []
    stated = [(k, u) for k, u in zip(UNIT_KEYS, units, strict=False) if u]
    try:
        if text is not None and (len(units) != len(UNIT_KEYS) or not stated):
            raise ValueError(f"{len(units)} units instead of {len(UNIT_KEYS)}")
        for key, unit in stated:
            UNIT_KEYS[key].parse(unit)
    except ValueError as error:
        raise UsageError(
            f"imu_units={text}: {error}.", IMU_UNITS_OPTION.help, "as in -o imu_units=g,deg/s,ms"
        ) from None
    return tuple(stated)


@dataclass(frozen=True)
class CutImuWindow:
    """A window as `.npy` [6, 400] fp32 at 200 Hz: accelerometer xyz, gyroscope xyz.

    Missing samples at the end are zeros.
    """

    recording: Path
    """Ego4D's `<uid>.csv`, or imu2clip's `<uid>.npy`."""
    timestamps: Path | None
    """imu2clip's `<uid>_timestamps.npy`."""
    start: float
    """Start in seconds of the video."""
    end: float
    """End in seconds of the video."""
    min_samples: int
    """Samples below which the window is bad."""
    units: tuple[tuple[str, str], ...] = ()
    """What the user says of the recording's units, as keys of a sample's json and their values."""

    def read_bytes(self) -> bytes:
        """Cut and resample as the modality does.

        Raises:
            BadSampleError: the recording cannot be read, or has too few samples in the window.
        """
        times = self.timestamps
        recording = _load_recording(
            self.recording,
            times,
            get_write_stamp(self.recording),
            0 if times is None else get_write_stamp(times),
            self.units,
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
                    f"too few samples: the window {self.start:g} to {self.end:g} s has {count}, "
                    f"and min_samples={self.min_samples}"
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
def _load_recording(
    path: Path,
    timestamps: Path | None,
    path_stamp: int,
    times_stamp: int,
    units: tuple[tuple[str, str], ...],
) -> ImuRecording | str:
    """A video's complete recording (1 hour: 35 MB), or why it cannot be used.

    The cache is small because the windows of a recording follow each other in the plan.
    """
    try:
        times = Part("timestamps.npy", timestamps.read_bytes()) if timestamps is not None else None
        recording = Part(f"imu{path.suffix}", path.read_bytes())
        with decoding():
            found = read_recording(recording, times, dict(units))
    except SampleError as error:
        return f"unreadable recording: {path.name}: {error.what}"
    if found.times is None:
        return (
            f"unreadable recording: {path.name} has no column of times, such as "
            f"canonical_timestamp_ms"
        )
    if not len(found.times):
        return f"no canonical times: no row of {path.name} lies within the video"
    return found


def find_recording(folder: Path, uid: str) -> RecordingFiles | None:
    """Find the recording of a video below a folder; None if there is none.

    imu2clip's pair of `.npy` files is preferred to the raw `.csv`: reading it takes a tenth of the
    time.
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
