"""Whether a node can write where the run will live, read what it will read, and how fast."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onellm_dist.diagnostics.preflight.options import Pretence

WRITTEN = 32 << 20
READ = 64 << 20
SEEN_PATIENCE_S = 15.0
"""Network file systems keep what a directory held for some seconds."""


def write_probe(folder: Path, node: str, pretence: Pretence, size: int = WRITTEN) -> dict[str, Any]:
    """Writes, syncs, renames, reads back and removes a file.

    Returns:
        free (bytes), write (bytes/s, fsync included), read (bytes/s), sync_seconds, rename_seconds; error where something failed.
    """
    name = folder / f".preflight-{node}-{os.getpid()}"
    renamed = name.with_name(name.name + ".renamed")
    found: dict[str, Any] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = (
            shutil.disk_usage(folder).free if pretence.free_bytes is None else pretence.free_bytes
        )
        found["free"] = free
        if free < 2 * size:
            return {**found, "error": f"{free / 1e6:.0f} MB free"}
        block = os.urandom(1 << 20)
        started = time.perf_counter()
        with name.open("wb") as out:
            for _ in range(size >> 20):
                out.write(block)
            out.flush()
            syncing = time.perf_counter()
            os.fsync(out.fileno())
        written = time.perf_counter()
        name.rename(renamed)
        settled = time.perf_counter()
        found |= {
            "write": size / (written - started),
            "sync_seconds": written - syncing,
            "rename_seconds": settled - written,
        }
        found["read"] = read_speed(renamed, size)
        if renamed.stat().st_size != size:
            found["error"] = f"a file of {size} bytes came back as {renamed.stat().st_size}"
    except OSError as error:
        found["error"] = f"{error.strerror or error}"
    finally:
        for path in (name, renamed):
            try:
                path.unlink(missing_ok=True)
            except OSError:
                continue
    return found


def read_speed(path: Path, most: int = READ) -> float:
    """Bytes/s of reading the file's beginning, its pages dropped from this node's cache before (where the kernel agrees)."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started, done = time.perf_counter(), 0
        while done < most and (block := file.read(1 << 20)):
            done += len(block)
        return done / max(1e-9, time.perf_counter() - started)


def data_probe(folders: list[Path]) -> dict[str, Any]:
    """Reads from a tar of each dataset.

    Returns:
        read: the slowest (bytes/s); missing: folders that are not there or hold nothing readable.
    """
    missing, speeds = list[str](), list[float]()
    for folder in folders:
        try:
            tar = next(folder.rglob("*.tar"), None)
            if tar is None:
                missing.append(f"{folder} (no tar in it)")
            else:
                speeds.append(read_speed(tar))
        except OSError as error:
            missing.append(f"{folder} ({error.strerror})")
    return {"read": min(speeds, default=None), "missing": missing}


def seen(files: Mapping[str, Path], patience: float = SEEN_PATIENCE_S) -> list[str]:
    """Nodes whose file appears here in time; `files` are all in one directory.

    Raises:
        OSError: the directory cannot be read.
    """
    deadline = time.monotonic() + patience
    while True:
        # A look at the directory makes NFS ask its server again.
        names = {entry.name for entry in os.scandir(next(iter(files.values())).parent)}
        found = [node for node, path in files.items() if path.name in names]
        if len(found) == len(files) or time.monotonic() > deadline:
            return found
        time.sleep(0.2)
