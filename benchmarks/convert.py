"""Convert a synthetic OneLLM checkpoint: peak memory, and speed beside `cp` of the same bytes.

    nice python benchmarks/convert.py [--layers 32] [--folder DIR]

`--layers 32` is the 7B (15.2 GB in bf16, and as much for the result); fewer layers keep every shape
and cut the size. The source holds one block of random bf16 bits, repeated. Before `cp
--sparse=never` and before the conversion the source is dropped from the page cache where that is
allowed; both end when their bytes are on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from onellm_dist.convert.formats.reference import PREFIX, to_reference_shape
from onellm_dist.convert.names.reference import to_reference_name
from onellm_dist.convert.tensors.lazy import BLOCK, LazyTensor
from onellm_dist.convert.tensors.writers import TensorFile, write_tensor_file
from onellm_dist.model import build_config
from onellm_dist.model.onellm import OneLLMForConditionalGeneration

CONVERT = """
import resource, sys, time
from pathlib import Path
import torch, transformers
from onellm_dist.convert.checkpoint import ConversionOptions
from onellm_dist.convert.conversion import convert
from onellm_dist.convert.formats import onellm, reference
options = ConversionOptions(shard_bytes=int(sys.argv[3]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start, worked = time.perf_counter(), time.process_time()
convert("reference", Path(sys.argv[1]), Path(sys.argv[2]), options=options, quiet=True)
seconds, cpu = time.perf_counter() - start, time.process_time() - worked
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, seconds, cpu)
"""


def repeat_pattern(shape: tuple[int, ...], pattern: torch.Tensor) -> LazyTensor:
    """A bf16 tensor whose bytes are `pattern`, repeated."""
    tensor = LazyTensor(shape, torch.bfloat16, lambda: torch.zeros(shape, dtype=torch.bfloat16))

    def stream() -> Iterator[torch.Tensor]:
        for at in range(0, tensor.nbytes, BLOCK):
            yield pattern[: min(BLOCK, tensor.nbytes - at)]

    return LazyTensor(shape, torch.bfloat16, tensor.load, stream)


def make_source(path: Path, layers: int) -> int:
    """Write the checkpoint. Returns its bytes."""
    config = build_config("onellm-7b")
    config.text_config.num_hidden_layers = layers
    with torch.device("meta"):
        model = OneLLMForConditionalGeneration(config)
    pattern = (
        (torch.randn(BLOCK // 2, generator=torch.Generator().manual_seed(0)) * 0.02)
        .bfloat16()
        .view(torch.uint8)
    )
    named = []
    for name, parameter in model.named_parameters():
        key, shape = to_reference_name(name), tuple(parameter.shape)
        shape = to_reference_shape(key, shape)
        named.append((PREFIX + key, repeat_pattern(shape, pattern)))
    return write_tensor_file(
        path,
        TensorFile(path.name, tuple(named)),
        on_bytes=lambda n: None,
        allow_nonfinite=lambda n: False,
    ).bytes


def drop_from_cache(path: Path) -> None:
    """Drop a file from the page cache, so that both sides read the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def time_copy(source: Path, target: Path) -> float:
    """Seconds that `cp` and fsync take."""
    drop_from_cache(source)
    start = time.perf_counter()
    subprocess.run(
        ["cp", "--sparse=never", "--reflink=never", str(source), str(target)], check=True
    )
    subprocess.run(["sync", str(target)], check=True)
    seconds = time.perf_counter() - start
    target.unlink()
    return seconds


def convert_once(source: Path, out: Path, shard_bytes: int) -> tuple[float, float, float, float]:
    """Convert in a process of its own.

    Returns:
        (GB resident before, GB at the peak, seconds, CPU seconds).
    """
    drop_from_cache(source)
    command = [sys.executable, "-c", CONVERT, str(source), str(out), str(shard_bytes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    before, peak, seconds, worked = (
        float(x) for x in re.findall(r"[\d.]+", done.stdout.splitlines()[-1])
    )
    return before * 1024 / 1e9, peak * 1024 / 1e9, seconds, worked


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=32, help="LLM layers; 32 is the 7B")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the files go for the time of the run"
    )
    parser.add_argument("--rounds", type=int, default=1, help="copies and conversions in turn")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        size = make_source(folder / "consolidated.00-of-01.pth", arguments.layers)
        if shutil.disk_usage(folder).free < size * 1.1:
            raise SystemExit(f"{folder} has no room for another {size / 1e9:.1f} GB")
        copies, conversions = [], []
        for _ in range(arguments.rounds):
            copies.append(time_copy(folder / "consolidated.00-of-01.pth", folder / "copy"))
            conversions.append(
                convert_once(
                    folder / "consolidated.00-of-01.pth", folder / "out", max(size // 4, 1)
                )
            )
            shutil.rmtree(folder / "out")
    best, fastest = min(copies), min(c[2] for c in conversions)
    found = {
        "GB": round(size / 1e9, 2),
        "cp_seconds": round(best, 1),
        "convert_seconds": round(fastest, 1),
        "speed_over_cp": round(best / fastest, 3),
        "resident_before_GB": round(conversions[0][0], 3),
        "peak_GB": round(max(c[1] for c in conversions), 3),
        "cpu_seconds": round(min(c[3] for c in conversions), 1),
        "load": os.getloadavg()[0],
        "cores": os.cpu_count(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
