"""Figures that are on disk as soon as they are known: a run that is cut off keeps what it has."""

from __future__ import annotations

import gc
import html
import importlib.util
import json
import statistics
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GIBI = 2**30

# Readers of media, which no measurement needs, may be absent. Every script here imports this file
# before the package.
for absent in ("av", "soundfile"):
    if importlib.util.find_spec(absent) is None:
        sys.modules[absent] = types.ModuleType(absent)


class Record:
    """Writes figures to `figures.json` and `page.html`.

    Args:
        out: folder of the files.
        budget: seconds that everything may take.
    """

    def __init__(self, out: Path, budget: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.figures: dict[str, dict[str, Any]] = {}
        self._budget = budget
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self._budget - self.seconds

    def add(self, name: str, /, **values: Any) -> None:
        """Print a figure and write all of them."""
        self.figures[name] = values
        shown = ", ".join(f"{key} {format_value(value)}" for key, value in values.items())
        print(f"[{self.seconds:4.0f} s] {name}: {shown}", flush=True)
        for file, text in (
            ("figures.json", json.dumps(self.figures, indent=1)),
            ("page.html", make_page(self.figures)),
        ):
            new = self.out / f"{file}.new"
            new.write_text(text, encoding="utf-8")
            new.replace(self.out / file)


def format_value(value: Any) -> str:
    """A value for people."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} {format_value(v)}" for k, v in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def make_page(figures: dict[str, dict[str, Any]]) -> str:
    """A page with a table for each figure."""
    parts = ["<!doctype html><meta charset=utf-8><title>One GPU, measured</title>"]
    parts.append("<style>body{font:14px sans-serif}td{padding:2px 12px 2px 0}</style>")
    for name, values in figures.items():
        rows = "".join(
            f"<tr><td>{html.escape(key)}<td>{html.escape(format_value(value))}"
            for key, value in values.items()
        )
        parts.append(f"<h3>{html.escape(name)}</h3><table>{rows}</table>")
    return "\n".join(parts) + "\n"


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clock(run: Callable[[], Any], repeats: int = 5, warm: int = 2) -> float:
    """Median seconds of a call, the device's work included."""
    for _ in range(warm):
        run()
    synchronise()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        synchronise()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def free_memory() -> None:
    """Give back what nobody holds any more, and count the peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def get_peak_gib() -> float:
    """Most memory that was allocated on the GPU; 0 without one."""
    return torch.cuda.max_memory_allocated() / GIBI if torch.cuda.is_available() else 0.0
