"""How fast shards are written, beside plain `tar` of the same files and webdataset's ShardWriter.

    python benchmarks/build.py [--samples 4000] [--folder DIR] [--rounds 3]

The writers take turns in one run, and the best round of each counts. `MB/s` is by the wall clock,
`MB/CPU-s` by processor time (of `tar` with its children). `builder` is the whole
`onellm shards build folder`: listing, reading, plan, hashes, records, Energon's files, without and
with the decode check. It reads its files, as `tar` does, and forces what it wrote to the disk, as
neither peer does.
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
    """Make 256 x 256 JPEGs as img2dataset stores them, with captions; return the bytes of all."""
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


def read_sample(folder: Path, i: int) -> dict[str, bytes]:
    """Read the parts of one sample."""
    return {e: (folder / f"{i:06d}.{e}").read_bytes() for e in ("jpg", "txt")}


def write_ours(folder: Path, out: Path, samples: int) -> None:
    """Write with our writer alone: tar, index, SHA-256 and CRC-32, forced to the disk."""
    writer = ShardWriter(out / "train-000000.tar", path="shards/train-000000.tar", split="train")
    for i in range(samples):
        writer.add(f"{i:06d}", read_sample(folder, i))
    writer.close()


def write_peer(folder: Path, out: Path, samples: int) -> None:
    """Write with webdataset's ShardWriter: a tar."""
    with webdataset.ShardWriter(
        str(out / "%06d.tar"), maxcount=10**9, maxsize=10**12, verbose=0
    ) as writer:
        for i in range(samples):
            writer.write({"__key__": f"{i:06d}", **read_sample(folder, i)})


def write_tar(folder: Path, out: Path, samples: int) -> None:
    """Write with the `tar` program."""
    subprocess.run(["tar", "-cf", str(out / "x.tar"), "-C", str(folder), "."], check=True)


def make_builder(check: bool) -> Callable[[Path, Path, int], None]:
    """Return a function that runs the whole builder."""

    def build(folder: Path, out: Path, samples: int) -> None:
        build_dataset("folder", folder, out / "set", options={"check": check, "name": "bench"})

    return build


def get_cpu_seconds() -> float:
    """Return the processor time of this process and of its ended children."""
    return sum(
        u.ru_utime + u.ru_stime
        for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def main() -> None:
    """Run the writers in turn and print a table."""
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
        writers = {
            "tar": write_tar,
            "ShardWriter": write_peer,
            "ours": write_ours,
            "builder": make_builder(False),
            "builder, decode check": make_builder(True),
        }
        best: dict[str, tuple[float, float]] = {}
        for _ in range(arguments.rounds):
            for name, write in writers.items():
                out = Path(work, "out")
                out.mkdir()
                os.sync()
                wall, cpu = time.perf_counter(), get_cpu_seconds()
                write(files, out, arguments.samples)
                wall, cpu = time.perf_counter() - wall, get_cpu_seconds() - cpu
                before = best.get(name, (wall, cpu))
                best[name] = (min(before[0], wall), min(before[1], cpu))
                shutil.rmtree(out)
    print(f"{arguments.samples} samples, {total / 1e6:.0f} MB, best of {arguments.rounds}")
    print(
        "| writer | MB/s | of tar | MB/CPU-s | of ShardWriter's MB/CPU-s |\n|---|---|---|---|---|"
    )
    for name, (wall, cpu) in best.items():
        ratios = best["tar"][0] / wall, best["ShardWriter"][1] / cpu
        speed = f"{total / wall / 1e6:.0f} | {ratios[0]:.2f}"
        print(f"| {name} | {speed} | {total / cpu / 1e6:.0f} | {ratios[1]:.2f} |")


if __name__ == "__main__":
    main()
