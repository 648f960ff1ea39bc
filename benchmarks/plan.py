"""Planning at scale: time and memory to open a mixture and plan a step, for 1e6 to 4e8 samples.

    python benchmarks/plan.py             # four sizes, about a minute, 82,800 temporary inodes
    python benchmarks/plan.py --samples 1000000

The mixture has one dataset per modality with equal weights. One of them has all the samples named
(9,662 per shard, like LAION-400M in 41,400 shards), the others 600,000 each. Manifests, file lists
and token counts are real; the tars and indexes are empty files, which planning does not read. Every
size runs in its own process. Limits: planning under 50 ms, opening under 5 s and 500 MB, fullest
micro-batch at most 1.10 times the mean.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onellm_dist.data.plan import Plan
    from onellm_dist.data.text import TextEncoder

LIMIT_MS, LIMIT_OPEN_S, LIMIT_MB, LIMIT_BALANCE = 50.0, 5.0, 500.0, 1.10
GLOBAL_BATCH, WORLD_SIZE, STEPS = 5120, 16, 200
PER_SHARD, OTHERS = 9662, 600_000
SIZES = (1_000_000, 10_000_000, 100_000_000, 400_000_000)


def main() -> int:
    """Run every size and print a table; return 1 if a limit is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, nargs="*", default=SIZES)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return 0
    print(
        f"global batch {GLOBAL_BATCH}, {WORLD_SIZE} ranks, {STEPS} steps; "
        "in parentheses: share of the limit"
    )
    columns = (
        ("samples", 11),
        ("shards", 7),
        ("open s", 14),
        ("MB", 12),
        ("plan ms", 9),
        ("99%", 13),
        ("CPU 99%", 8),
        ("fullest/mean", 13),
    )
    print(" ".join(f"{name:>{width}}" for name, width in columns), "micro-batches")
    met = True
    for samples in arguments.samples:
        with tempfile.TemporaryDirectory() as folder:
            shards = make_datasets(Path(folder), samples)
            command = [sys.executable, __file__, "--one", folder]
            r = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout
            )
        met &= (
            r["open_s"] < LIMIT_OPEN_S
            and r["mb"] < LIMIT_MB
            and r["p99_ms"] < LIMIT_MS
            and r["balance"] <= LIMIT_BALANCE
        )
        opened = f"{r['open_s']:.2f} ({r['open_s'] / LIMIT_OPEN_S:.2f})"
        memory = f"{r['mb']:.0f} ({r['mb'] / LIMIT_MB:.2f})"
        slowest = f"{r['p99_ms']:.1f} ({r['p99_ms'] / LIMIT_MS:.2f})"
        print(
            f"{samples:>11,} {shards:>7,} {opened:>14} {memory:>12} {r['median_ms']:>9.1f} "
            f"{slowest:>13} {r['cpu_p99_ms']:>8.1f} {r['balance']:>13.3f} "
            f"{r['micro_batches']:>11.1f}",
            flush=True,
        )
    return 0 if met else 1


def list_modalities() -> list[str]:
    """Return the names of all modalities."""
    from onellm_dist.modalities import all_modalities

    return list(all_modalities())


def make_datasets(root: Path, samples: int) -> int:
    """Write the simulated datasets; return their number of shards."""
    from onellm_dist.data.token_counts import get_token_count_path
    from onellm_dist.shards.format.dataset import Dataset, Manifest, ShardInfo
    from onellm_dist.shards.format.index import get_index_path

    fingerprint = build_encoder().fingerprint
    total = 0
    for number, name in enumerate(list_modalities()):
        count = -(-(samples if number == 0 else OTHERS) // PER_SHARD)
        infos = tuple(
            ShardInfo(f"shards/train-{i:06d}.tar", "train", PER_SHARD, 0, f"{i:064x}"[::-1])
            for i in range(count)
        )
        dataset = Dataset(
            root / name, Manifest(name, (name,), ("txt",), "none", "benchmark", infos)
        )
        (dataset.root / "shards").mkdir(parents=True)
        (dataset.root / "manifest.json").write_bytes(dataset.manifest.to_bytes())
        (dataset.root / "token_counts" / fingerprint).mkdir(parents=True)
        original = dataset.root / "token_counts.npy"
        np.save(original, draw_token_counts(number))
        for info in infos:
            dataset.tar_path(info).touch()
            get_index_path(dataset.tar_path(info)).touch()
            os.link(original, get_token_count_path(dataset, info, fingerprint))
        total += count
    return total


def draw_token_counts(seed: int) -> np.ndarray:
    """[PER_SHARD, 2] token counts of web captions: log-normal about 16 tokens, cut at 96."""
    tokens = np.clip(
        np.random.default_rng(seed).lognormal(2.8, 0.6, PER_SHARD).astype(np.uint16) + 2, 3, 96
    )
    return np.stack([tokens, tokens - 1], axis=1).astype(np.uint16)


def build_encoder() -> TextEncoder:
    """Build an encoder of captions with the toy tokenizer."""
    from transformers import AutoTokenizer

    import onellm_dist
    from onellm_dist.data.text import TextEncoder

    folder = Path(onellm_dist.__file__).parent / "model" / "assets" / "toy_tokenizer"
    return TextEncoder(
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False), "caption", 96
    )


def measure(root: Path) -> dict[str, float]:
    """Open and plan; times in ms unless named otherwise, memory in MB beyond the imports."""
    import psutil

    from onellm_dist.config.schema import DataSection, MixtureEntry
    from onellm_dist.data.corpus import Corpus, open_datasets
    from onellm_dist.data.plan import Plan

    text_encoder, names = build_encoder(), list_modalities()
    config = DataSection(
        root=root,
        mixture=tuple(MixtureEntry(path=Path(name)) for name in names),
        global_batch=GLOBAL_BATCH,
    )
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    plan = Plan(Corpus(open_datasets(config, names), config, text_encoder, 0, names))
    plan.step(0, WORLD_SIZE)
    opened = time.perf_counter() - started
    times, cpu, ratios, counts = zip(*plan_steps(plan, names), strict=True)
    return {
        "open_s": opened,
        "mb": (psutil.Process().memory_info().rss - before) / 2**20,
        "median_ms": float(np.median(times)),
        "p99_ms": float(np.percentile(times, 99)),
        "cpu_p99_ms": float(np.percentile(cpu, 99)),
        "balance": max(ratios),
        "micro_batches": float(np.mean(counts)),
    }


def plan_steps(plan: Plan, names: list[str]) -> Iterator[tuple[float, float, float, int]]:
    """Plan steps far apart, so that most of them use other shards.

    Yields:
        Milliseconds, CPU milliseconds, fullest micro-batch over the mean, and micro-batches.
    """
    from onellm_dist.data.costs import CostModel, count_llm_tokens

    model = CostModel()
    media = [
        model.media([plan.corpus.modalities[name] for name in spans]) for spans in plan.corpus.spans
    ]
    for step in [*range(1, STEPS // 2), *range(1000, 1000 + STEPS // 2)]:
        wall, cpu = time.perf_counter(), time.process_time()
        assigned = plan.step(step, WORLD_SIZE)
        own = assigned.ranks[0]
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        costs = []
        for micro in (m for rank in assigned.ranks for m in rank):
            text = np.asarray([s.text_tokens for s in micro.samples])
            work = np.asarray([media[s.dataset] for s in micro.samples])
            costs.append(
                model.samples(
                    work, count_llm_tokens(text, np.ones(len(text), dtype=np.int64))
                ).sum()
            )
        yield wall * 1e3, cpu * 1e3, max(costs) / float(np.mean(costs)), len(own)


if __name__ == "__main__":
    sys.exit(main())
