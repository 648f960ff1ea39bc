"""Sounds, motion logs and resting-state BOLD, in the forms that the modalities read."""

from __future__ import annotations

import gzip
import io

import av
import numpy as np
import soundfile

GRAVITY = 9.80665
"""m/s^2 of one g."""


def cut_soundtrack(video: bytes, start: float, seconds: float) -> bytes:
    """Cut a piece of a video's first audio stream, as a 16-bit mono WAV file.

    Args:
        video: the video file.
        start: begin of the piece in seconds.
        seconds: length of the piece.

    Raises:
        ValueError: the file has no sound there.
    """
    with av.open(io.BytesIO(video), mode="r") as container:
        if not container.streams.audio:
            raise ValueError("the video has no audio stream")
        rate = container.streams.audio[0].rate
        resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
        frames = [
            f.to_ndarray().reshape(-1)
            for frame in container.decode(audio=0)
            for f in resampler.resample(frame)
        ]
    sound = np.concatenate(frames)[round(start * rate) : round((start + seconds) * rate)]
    if not len(sound):
        raise ValueError(f"the sound ends before {start} s")
    buffer = io.BytesIO()
    soundfile.write(buffer, sound, rate, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def cut_xsens_window(log: bytes, start: float, seconds: float) -> bytes:
    """Cut a window of an Xsens text log, as an IMU CSV in Ego4D's form.

    Args:
        log: the log in m/s^2 and rad/s; its header names the rate.
        start: begin of the window in seconds.
        seconds: length of the window.
    """
    lines = log.decode("ascii").splitlines()
    rate = next(
        float(line.split(":")[1].removesuffix("Hz"))
        for line in lines
        if line.startswith("// Sample rate")
    )
    at = next(i for i, line in enumerate(lines) if line.startswith("Counter"))
    names = lines[at].split()
    table = np.array(
        [line.split()[: len(names)] for line in lines[at + 1 :] if line.strip()], np.float64
    )
    column = {name: table[:, i] for i, name in enumerate(names)}
    accelerometer = np.stack([column[f"Acc_{axis}"] for axis in "XYZ"])
    gyroscope = np.stack([column[f"Gyr_{axis}"] for axis in "XYZ"])
    return format_imu_csv(accelerometer, gyroscope, rate, start, seconds)


def cut_ximu_window(log: bytes, rate: float, start: float, seconds: float) -> bytes:
    """Cut a window of an x-IMU CSV log, as an IMU CSV in Ego4D's form.

    Args:
        log: the log in deg/s and g, which are converted to rad/s and m/s^2.
        rate: measurements per second.
        start: begin of the window in seconds.
        seconds: length of the window.
    """
    table = np.array(
        [line.split(",") for line in log.decode("ascii").splitlines()[1:] if line.strip()],
        np.float64,
    )
    accelerometer, gyroscope = table[:, 4:7].T * GRAVITY, np.deg2rad(table[:, 1:4].T)
    return format_imu_csv(accelerometer, gyroscope, rate, start, seconds)


def format_imu_csv(
    accelerometer: np.ndarray, gyroscope: np.ndarray, rate: float, start: float, seconds: float
) -> bytes:
    """Format a window with the columns of Ego4D's `v2/imu/<video_uid>.csv`, at the sensor's rate.

    Args:
        accelerometer: [3, T] m/s^2.
        gyroscope: [3, T] rad/s.
        rate: measurements per second.
        start: begin of the window in seconds.
        seconds: length of the window.

    Raises:
        ValueError: the log ends before the window does.
    """
    first, count = round(start * rate), round(seconds * rate)
    if first + count > accelerometer.shape[1]:
        raise ValueError(
            f"the log has {accelerometer.shape[1] / rate:.1f} s, "
            f"and the window ends at {start + seconds} s"
        )
    rows = [
        "component_idx,component_timestamp_ms,canonical_timestamp_ms,"
        "gyro_x,gyro_y,gyro_z,accl_x,accl_y,accl_z"
    ]
    for i in range(count):
        stamp = 1000 * i / rate
        values = [*gyroscope[:, first + i], *accelerometer[:, first + i]]
        rows.append(f"0,{stamp:.3f},{stamp:.3f}," + ",".join(f"{v:.7g}" for v in values))
    return ("\n".join(rows) + "\n").encode("ascii")


def read_mgz(data: bytes) -> np.ndarray:
    """Read a FreeSurfer MGZ file of surface data (its height and depth are 1).

    The format is that of FreeSurfer's `mri.h` and nibabel 5.4's `MGHHeader`: int32 version, width,
    height, depth, frames and type (3 is float32), big-endian; data from byte 284, frames last.

    Returns:
        [vertices, frames] fp32.

    Raises:
        ValueError: the file has another version, type or size.
    """
    plain = gzip.decompress(data)
    header = np.frombuffer(plain[:24], ">i4")
    version, width, height, depth, frames, dtype = (int(v) for v in header)
    if version != 1 or dtype != 3 or len(plain) < 284 + 4 * width * height * depth * frames:
        raise ValueError("not an MGH file of float32")
    values = np.frombuffer(plain, ">f4", width * height * depth * frames, 284)
    return np.ascontiguousarray(values.reshape(frames, width * height * depth).T, np.float32)


def make_bold_vector(
    hemispheres: list[np.ndarray], voxels: int, frame: int, repetitions: int = 3
) -> np.ndarray:
    """Bring real BOLD into the shape of an NSD sample.

    NSD's vector has the voxels of one subject's `nsdgeneral` region, which no public file has. This
    one has the first `voxels` cortical vertices with any signal (left hemisphere, then right), each
    z-scored over the scan. Consecutive volumes replace NSD's repetitions of one picture.

    Args:
        hemispheres: [vertices, frames] of each hemisphere.
        voxels: number of vertices to take.
        frame: the first volume.
        repetitions: number of volumes.

    Returns:
        [repetitions, voxels] fp32.

    Raises:
        ValueError: there are too few vertices or frames.
    """
    series = np.concatenate(hemispheres)
    deviation = series.std(1)
    alive = series[deviation > 0][:voxels]
    if len(alive) < voxels or frame + repetitions > series.shape[1]:
        raise ValueError(
            f"{len(alive)} vertices with signal and {series.shape[1]} frames; "
            f"{voxels} and {frame + repetitions} are needed"
        )
    z = (alive - alive.mean(1, keepdims=True)) / alive.std(1, keepdims=True)
    return np.ascontiguousarray(z[:, frame : frame + repetitions].T, np.float32)


def encode_npy(array: np.ndarray) -> bytes:
    """Encode an array as a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
