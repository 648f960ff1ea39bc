"""Whether a node can write where the run will be, read what it will read, and how fast."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onellm_dist.diagnostics.preflight.options import SimulatedFaults

WRITTEN_BYTES = 32 << 20
READ_BYTES = 64 << 20
VISIBLE_S = 15.0
"""Network file systems cache a directory's entries for some seconds."""


def probe_disk(
    folder: Path, node: str, simulated: SimulatedFaults, size: int = WRITTEN_BYTES
) -> dict[str, Any]:
    """Write, sync, rename, read back and remove a file.

    Args:
        folder: where to write; made if it is not there.
        node: this node's name, part of the file's name.
        simulated: faults to simulate.
        size: bytes to write.

    Returns:
        free (bytes), write (bytes/s, fsync included), read (bytes/s), sync_seconds,
        rename_seconds; error if something failed.
    """
    path = folder / f".preflight-{node}-{os.getpid()}"
    renamed = path.with_name(path.name + ".renamed")
    found: dict[str, Any] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = simulated.free_bytes
        if free is None:
            free = shutil.disk_usage(folder).free
        found["free"] = free
        if free < 2 * size:
            return {**found, "error": f"{free / 1e6:.0f} MB free"}
        found |= _time_writing(path, renamed, size)
        found["read"] = measure_read_speed(renamed, size)
        if renamed.stat().st_size != size:
            found["error"] = f"a file of {size} bytes came back as {renamed.stat().st_size}"
    except OSError as error:
        found["error"] = f"{error.strerror or error}"
    finally:
        for left in (path, renamed):
            try:
                left.unlink(missing_ok=True)
            except OSError:
                continue
    return found


def _time_writing(path: Path, renamed: Path, size: int) -> dict[str, float]:
    block = os.urandom(1 << 20)
    started = time.perf_counter()
    with path.open("wb") as out:
        for _ in range(size >> 20):
            out.write(block)
        out.flush()
        syncing = time.perf_counter()
        os.fsync(out.fileno())
    written = time.perf_counter()
    path.rename(renamed)
    return {
        "write": size / (written - started),
        "sync_seconds": written - syncing,
        "rename_seconds": time.perf_counter() - written,
    }


def measure_read_speed(path: Path, most: int = READ_BYTES) -> float:
    """Bytes/s of reading the first `most` bytes of a file.

    Its pages are first dropped from this node's cache, if the kernel agrees.
    """
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        done = 0
        started = time.perf_counter()
        while done < most and (block := file.read(1 << 20)):
            done += len(block)
        return done / max(1e-9, time.perf_counter() - started)


def probe_data(folders: list[Path]) -> dict[str, Any]:
    """Read from one tar of each dataset.

    Returns:
        read: the slowest speed (bytes/s); missing: folders that are not there or hold nothing
        readable.
    """
    missing = list[str]()
    speeds = list[float]()
    for folder in folders:
        try:
            tar = next(folder.rglob("*.tar"), None)
            if tar is None:
                missing.append(f"{folder} (no tar in it)")
            else:
                speeds.append(measure_read_speed(tar))
        except OSError as error:
            missing.append(f"{folder} ({error.strerror})")
    return {"read": min(speeds, default=None), "missing": missing}


def find_visible(files: Mapping[str, Path], patience: float = VISIBLE_S) -> list[str]:
    """The nodes whose file appears here in time.

    Args:
        files: node -> its file; all files are in one directory.
        patience: seconds to wait for files that are not visible yet.

    Raises:
        OSError: the directory cannot be read.
    """
    folder = next(iter(files.values())).parent
    deadline = time.monotonic() + patience
    while True:
        # Listing the directory makes NFS ask its server again.
        names = {entry.name for entry in os.scandir(folder)}
        visible = [node for node, path in files.items() if path.name in names]
        if len(visible) == len(files) or time.monotonic() > deadline:
            return visible
        time.sleep(0.2)
