"""One tiny model and one dataset of each benchmark, made once a process for all tests that ask."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from benchmark_trees import write_benchmark

from onellm_dist.model.presets import load_model
from onellm_dist.shards import build_dataset

_ROOT: list[Path] = []


@pytest.fixture(scope="session")
def toy_model() -> tuple[Any, Any]:
    """A model of random weights, and its tokenizer."""
    return _load()


@pytest.fixture(scope="session")
def benchmark_data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Benchmark -> the folder in which its dataset lies, which is built when it is first asked."""
    if not _ROOT:
        _ROOT.append(tmp_path_factory.mktemp("benchmarks"))
    return _build


@cache
def _load() -> tuple[Any, Any]:
    loaded, processor = load_model(path=None, preset="toy", seed=0)
    model: Any = loaded
    return model.eval(), processor.tokenizer


@cache
def _build(name: str) -> Path:
    (root,) = _ROOT
    inputs = write_benchmark(root / "in" / name, name)
    report = build_dataset(
        f"{name}-eval", inputs, root / "data" / f"{name}-eval", options={"any_count": True}
    )
    assert not report.failures, report.quarantined
    return root / "data"
