"""Small real files of the signal modalities, and what disks, networks and people do to files."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cache

import numpy as np
import soundfile
from hypothesis import strategies as st
from media_samples import npy, sound_by_ffmpeg, tone

from onellm_dist.modalities import Part

Mutation = tuple[str, float, float, int]
"""Kind, place and size as shares of the file, and a seed."""
KINDS = ("truncate", "flip", "flip the header", "pad", "junk before", "splice", "zero", "repeat")

mutations = st.tuples(
    st.sampled_from(KINDS), st.floats(0, 1), st.floats(0, 0.4), st.integers(0, 2**32 - 1)
)


def mutate(data: bytes, mutation: Mutation) -> bytes:
    """Damage a file."""
    kind, place, size, seed = mutation
    rng = np.random.default_rng(seed)
    at, length = int(place * len(data)), int(size * len(data)) + 1
    if kind == "truncate":
        return data[:at]
    if kind in ("flip", "flip the header"):
        out = bytearray(data)
        reach = min(len(out), 200) if kind == "flip the header" else len(out)
        for bit in rng.integers(0, 8 * reach, int(rng.integers(1, 9))).tolist() if reach else ():
            out[bit // 8] ^= 1 << bit % 8
        return bytes(out)
    if kind == "pad":
        return data + (bytes(length) if seed % 2 else rng.bytes(length))
    if kind == "junk before":
        return (bytes(length) if seed % 2 else rng.bytes(length)) + data
    if kind == "splice":
        return data[:at] + rng.bytes(length) + data[at + seed % 2 * length :]
    if kind == "zero":
        return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
    return data[:at] + data[at : at + length] + data[at:]


def written(wave: np.ndarray, rate: int, form: str, subtype: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format=form, subtype=subtype)
    return buffer.getvalue()


def imu_csv(
    names: str = "timestamp_ms,accl_x,accl_y,accl_z,gyro_x,gyro_y,gyro_z",
    seconds: float = 2.0,
    rate: float = 100.0,
    *,
    time: float = 1000.0,
    accelerometer: float = 1.0,
    gyroscope: float = 1.0,
    delimiter: str = ",",
) -> bytes:
    """A walk as a table, with times a second, a m/s^2 and a rad/s in the units of its columns."""
    at = np.arange(int(seconds * rate)) / rate
    signal = walk(at)
    signal[:3] *= accelerometer
    signal[3:] *= gyroscope
    rows = np.concatenate([at[None] * time, signal]).T
    lines = [names, *(delimiter.join(repr(float(v)) for v in row) for row in rows)]
    return ("\n".join(lines) + "\n").encode()


def walk(at: np.ndarray) -> np.ndarray:
    """[6, N] in m/s^2 and rad/s, at these seconds."""
    swing = np.sin(2 * np.pi * 1.5 * at)
    return np.stack([swing, 0.5 * swing, 9.81 + 2 * swing, 0.3 * swing, swing, -0.2 * swing])


def ply(points: int = 400, layout: str = "binary_little_endian") -> bytes:
    xyz, colours = cloud(points)
    head = ["ply", f"format {layout} 1.0", f"element vertex {points}"]
    head += [f"property float {axis}" for axis in "xyz"]
    head += [f"property uchar {name}" for name in ("red", "green", "blue")]
    start = "\n".join([*head, "end_header", ""]).encode()
    if layout == "ascii":
        rows = zip(xyz.tolist(), colours.tolist(), strict=True)
        return start + "".join(f"{' '.join(map(str, (*p, *c)))}\n" for p, c in rows).encode()
    table = np.zeros(points, [("p", "<f4", 3), ("c", "u1", 3)])
    table["p"], table["c"] = xyz, colours
    return start + table.tobytes()


def pcd(points: int = 400) -> bytes:
    xyz, colours = cloud(points)
    packed = (colours.astype(np.uint32) << np.array([16, 8, 0], np.uint32)).sum(1)
    table = np.zeros(points, [("p", "<f4", 3), ("rgb", "<u4")])
    table["p"], table["rgb"] = xyz, packed
    head = (
        "VERSION 0.7\nFIELDS x y z rgb\nSIZE 4 4 4 4\nTYPE F F F U\nCOUNT 1 1 1 1\n"
        f"WIDTH {points}\nHEIGHT 1\nPOINTS {points}\nDATA binary\n"
    )
    return head.encode() + table.tobytes()


def cloud(points: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, 3] fp32 positions and [N, 3] uint8 colours."""
    rng = np.random.default_rng(points)
    positions = rng.normal(size=(points, 3)).astype(np.float32)
    return positions, rng.integers(0, 256, (points, 3)).astype(np.uint8)


def _npy_cloud() -> bytes:
    xyz, colours = cloud(400)
    return npy(np.concatenate([xyz, colours / 255], 1).astype(np.float32)).data


_SIGNALS: dict[str, Callable[[], tuple[str, Part]]] = {
    "wav": lambda: ("audio", Part("wav", written(tone(16000, 1.0), 16000, "WAV", "PCM_16"))),
    "float wav": lambda: ("audio", Part("wav", written(tone(8000, 1.0), 8000, "WAV", "FLOAT"))),
    "flac": lambda: ("audio", Part("flac", written(tone(16000, 1.0), 16000, "FLAC", "PCM_16"))),
    "ogg": lambda: ("audio", Part("ogg", written(tone(16000, 1.0), 16000, "OGG", "VORBIS"))),
    "aiff": lambda: ("audio", Part("aiff", written(tone(16000, 1.0), 16000, "AIFF", "PCM_16"))),
    "mp3": lambda: (
        "audio",
        Part("mp3", sound_by_ffmpeg(tone(16000, 1.0), 16000, "mp3", "libmp3lame")),
    ),
    "m4a": lambda: ("audio", Part("m4a", sound_by_ffmpeg(tone(16000, 1.0), 16000, "ipod", "aac"))),
    "imu npy": lambda: ("imu", npy(walk(np.arange(400) / 200), "imu.npy")),
    "imu csv": lambda: ("imu", Part("imu.csv", imu_csv())),
    "cloud npy": lambda: ("point", Part("npy", _npy_cloud())),
    "ply": lambda: ("point", Part("ply", ply())),
    "ascii ply": lambda: ("point", Part("ply", ply(layout="ascii"))),
    "pcd": lambda: ("point", Part("pcd", pcd())),
    "fmri": lambda: (
        "fmri",
        npy(np.random.default_rng(0).normal(size=(2, 15724)).astype(np.float32), "fmri.npy"),
    ),
}
SIGNALS = tuple(_SIGNALS)


@cache
def signal(name: str) -> tuple[str, Part]:
    """The modality of a file, and the file."""
    return _SIGNALS[name]()
