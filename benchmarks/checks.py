"""What the checks of shards cost: opening a dataset and its indexes, and their share of an epoch.

    python benchmarks/checks.py                    # 2,000 shards, an index of 10,000 samples

Opening a dataset parses and checks a manifest, and lists its files; it is compared with parsing
the JSON and listing alone. Opening an index checks its CRC-32 and its columns, once a process; the
cost is compared with the time in which one core decodes the samples of that shard, because that is
what the check is spread over. Limits: the checks take at most 2% of that time, and opening a
dataset at most as long as version 0.1.0 took (whose way of opening is timed in the same rounds).
Rounds take turns, by CPU time, and the medians are printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import numpy as np

LIMIT = 0.02
PER_SHARD = 10_000
DECODE_SECONDS = 1 / 400
"""CPU time in which one core reads and decodes a picture (benchmarks/loader.py prints its rate)."""


def main() -> int:
    """Print a table; return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--decode-rate", type=float, default=1 / DECODE_SECONDS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_manifest(root, arguments.shards)
        index = make_index(root)
        times = measure(
            {
                "dataset, as 0.1.0 opened it": lambda: open_as_before(root),
                "dataset, checked": lambda: open_checked(root),
                "index, unchecked": lambda: open_index(index, check=False),
                "index, checked": lambda: open_index(index, check=True),
            },
            arguments.rounds,
        )
    return report(times, arguments.decode_rate, arguments.shards)


def make_manifest(root: Path, shards: int) -> None:
    """Write a manifest, and empty files for what it lists."""
    from onellm_dist.shards.format.manifest import MANIFEST, Manifest, ShardInfo

    listed = []
    (root / "shards").mkdir()
    for number in range(shards):
        path = f"shards/train-{number:06d}.tar"
        digest = hashlib.sha256(path.encode()).hexdigest()
        listed.append(ShardInfo(path, "train", PER_SHARD, 1 << 30, digest))
        (root / path).touch()
        (root / f"{path}.index").touch()
    manifest = Manifest("pictures", ("image",), ("txt",), "none", "benchmark", tuple(listed))
    (root / MANIFEST).write_bytes(manifest.to_file())


def make_index(root: Path) -> Path:
    """Write an index of PER_SHARD samples of a picture, a caption and metadata."""
    from onellm_dist.shards.format.index import IndexRows, PartLocation, pack_index

    draw, rows, offset = np.random.default_rng(0), IndexRows(), 0
    for number in range(PER_SHARD):
        parts, start = {}, offset
        for extension, least in (("jpg", 30_000), ("json", 400), ("txt", 60)):
            size = int(draw.integers(least, 2 * least))
            parts[extension] = PartLocation(offset + 512, size, int(draw.integers(0, 1 << 32)))
            offset += 512 + -(-size // 512) * 512
        rows.add(f"{number:09d}", start, parts, parts["txt"].size)
    path = root / "x.tar.index"
    path.write_bytes(
        pack_index(rows, tar_name="x.tar", tar_bytes=offset + 1024, tar_sha256="0" * 64, end=offset)
    )
    return path


def open_as_before(root: Path) -> None:
    """Do what 0.1.0 did: parse the JSON, make a record a shard, list the files."""
    from onellm_dist.shards.format.index import get_index_path
    from onellm_dist.shards.format.manifest import MANIFEST, ShardInfo

    shards = [ShardInfo(**s) for s in json.loads((root / MANIFEST).read_bytes())["shards"]]
    folders = {str(PurePosixPath(s.path).parent) for s in shards}
    found = {str(PurePosixPath(f) / entry.name) for f in folders for entry in (root / f).iterdir()}
    expected = [p for s in shards for p in (s.path, str(get_index_path(Path(s.path))))]
    assert all(path in found for path in expected)


def open_checked(root: Path) -> None:
    """Open the dataset."""
    from onellm_dist.shards.format.dataset import open_dataset

    open_dataset(root)


def open_index(path: Path, *, check: bool) -> None:
    """Open an index."""
    from onellm_dist.shards.format.index import ShardIndex

    assert len(ShardIndex(path, check=check)) == PER_SHARD


def measure(actions: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each action, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            started = time.process_time()
            action()
            if number:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(own) for name, own in times.items()}


def report(times: dict[str, float], rate: float, shards: int) -> int:
    """Print the table; return 1 if a limit is missed."""
    for name, seconds in times.items():
        print(f"{name:30} {1e3 * seconds:10.2f} ms")
    checks = times["index, checked"] - times["index, unchecked"]
    share = checks / (PER_SHARD / rate)
    ratio = times["dataset, checked"] / times["dataset, as 0.1.0 opened it"]
    print(
        f"checks of an index: {share:.4%} of the time in which one core decodes its {PER_SHARD:,} "
        f"samples at {rate:.0f}/s (limit {LIMIT:.0%})"
    )
    print(
        f"opening a dataset of {shards:,} shards: {ratio:.2f} of the time without checks (limit 1)"
    )
    met = share <= LIMIT and ratio <= 1
    print(f"limits: {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
