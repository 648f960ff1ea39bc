"""How fast shards are written: our writer beside plain `tar` of the same files and webdataset's ShardWriter, in one run.

    python benchmarks/build.py [--samples 4000] [--folder DIR] [--rounds 3]

The writers take turns; the best round of each counts. `MB/s` is by the wall clock, `MB/CPU-s` by the processor's (that of `tar`
with its children). `builder` is the whole `onellm shards build folder`: listing, reading, plan, hashes, records, Energon's files,
without and with the decode check; it reads its files, as `tar` does, and syncs what it wrote, as neither peer does.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from onellm_dist.shards import build_dataset
from onellm_dist.shards.format.tar_writer import ShardWriter


def make_files(folder: Path, samples: int) -> int:
    """JPEGs of 256 x 256 as img2dataset leaves them, each with a caption; returns the bytes of all."""
    draw, total = random.Random(0), 0
    pictures = []
    for seed in range(64):
        grid = np.random.default_rng(seed).integers(0, 255, (24, 24, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(grid).resize((256, 256), Image.Resampling.BICUBIC).save(
            buffer, "JPEG", quality=95
        )
        pictures.append(buffer.getvalue())
    for i in range(samples):
        caption = " ".join(draw.choices(["a", "cat", "on", "the", "red", "table"], k=9)).encode()
        (folder / f"{i:06d}.jpg").write_bytes(pictures[i % 64])
        (folder / f"{i:06d}.txt").write_bytes(caption)
        total += len(pictures[i % 64]) + len(caption)
    return total


def read(folder: Path, i: int) -> dict[str, bytes]:
    """One sample's parts."""
    return {e: (folder / f"{i:06d}.{e}").read_bytes() for e in ("jpg", "txt")}


def ours(folder: Path, out: Path, samples: int) -> None:
    """Our writer alone: tar, index, SHA-256 and CRC-32, synced."""
    writer = ShardWriter(out / "train-000000.tar", path="shards/train-000000.tar", split="train")
    for i in range(samples):
        writer.add(f"{i:06d}", read(folder, i))
    writer.close()


def peer(folder: Path, out: Path, samples: int) -> None:
    """Webdataset's ShardWriter: a tar."""
    with webdataset.ShardWriter(
        str(out / "%06d.tar"), maxcount=10**9, maxsize=10**12, verbose=0
    ) as writer:
        for i in range(samples):
            writer.write({"__key__": f"{i:06d}", **read(folder, i)})


def tar(folder: Path, out: Path, samples: int) -> None:
    """The `tar` program."""
    subprocess.run(["tar", "-cf", str(out / "x.tar"), "-C", str(folder), "."], check=True)


def builder(check: bool) -> Callable[[Path, Path, int], None]:
    """The whole builder."""

    def build(folder: Path, out: Path, samples: int) -> None:
        build_dataset("folder", folder, out / "set", options={"check": check, "name": "bench"})

    return build


def cpu_seconds() -> float:
    """Of this process and the ended children."""
    return sum(
        u.ru_utime + u.ru_stime
        for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> None:
    """Runs the writers in turn and prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder",
        type=Path,
        default=None,
        help="where files are written; default: the system's temporary folder",
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        files = Path(work, "files")
        files.mkdir()
        total = make_files(files, arguments.samples)
        kinds = {
            "tar": tar,
            "ShardWriter": peer,
            "ours": ours,
            "builder": builder(False),
            "builder, decode check": builder(True),
        }
        best: dict[str, tuple[float, float]] = {}
        for _ in range(arguments.rounds):
            for name, write in kinds.items():
                out = Path(work, "out")
                out.mkdir()
                os.sync()
                wall, cpu = time.perf_counter(), cpu_seconds()
                write(files, out, arguments.samples)
                wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
                before = best.get(name, (wall, cpu))
                best[name] = (min(before[0], wall), min(before[1], cpu))
                shutil.rmtree(out)
    print(f"{arguments.samples} samples, {total / 1e6:.0f} MB, best of {arguments.rounds}")
    print(
        "| writer | MB/s | of tar | MB/CPU-s | of ShardWriter's MB/CPU-s |\n|---|---|---|---|---|"
    )
    for name, (wall, cpu) in best.items():
        ratios = best["tar"][0] / wall, best["ShardWriter"][1] / cpu
        print(
            f"| {name} | {total / wall / 1e6:.0f} | {ratios[0]:.2f} | {total / cpu / 1e6:.0f} | {ratios[1]:.2f} |"
        )


if __name__ == "__main__":
    main()
