"""A few rows of each benchmark in its official layout, with real media."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmark_files import Files
from picture_benchmarks import (
    flickr30k,
    gqa,
    how2qa,
    mmbench,
    mme,
    mmvet,
    msvd,
    nextqa,
    nocaps,
    scienceqa,
    seedbench,
    textvqa,
    vizwiz,
    vqa,
)
from shard_worlds import write_tree
from signal_benchmarks import (
    avsd,
    clotho,
    clotho_aqa,
    ego4d,
    music_avqa,
    nsd,
    objaverse,
    rooms,
    valor,
    vatex,
)

TREES: dict[str, Callable[[], Files]] = {
    "gqa": gqa,
    "vqav2": lambda: vqa("v2_"),
    "okvqa": lambda: vqa(""),
    "textvqa": textvqa,
    "vizwiz": vizwiz,
    "scienceqa": scienceqa,
    "mmbench": mmbench,
    "mmvet": mmvet,
    "seedbench": seedbench,
    "nextqa": nextqa,
    "how2qa": how2qa,
    "mme": mme,
    "msvd-qa": msvd,
    "nocaps": nocaps,
    "flickr30k": flickr30k,
    "vatex": vatex,
    "clotho": clotho,
    "clotho-aqa": clotho_aqa,
    "music-avqa": music_avqa,
    "valor32k": valor,
    "avsd": avsd,
    "objaverse-caption": objaverse,
    "objaverse-class": objaverse,
    "nyuv2-depth": rooms,
    "nyuv2-normal": rooms,
    "sunrgbd-depth": rooms,
    "sunrgbd-normal": rooms,
    "ego4d-imu": ego4d,
    "nsd": nsd,
}
"""Benchmark -> its files."""


def write_benchmark(root: Path, name: str) -> Path:
    """Write a benchmark's files."""
    return write_tree(root, TREES[name]())
