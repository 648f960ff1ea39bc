"""Where the frozen weights of a run came from: a checkpoint resumes only over the same ones.

Checkpoints hold the trainable state alone. The manifest's `frozen` is
`{"preset": ..., "seed": ...}` for weights that are drawn or come with a preset, or
`{"path": ..., "files": {name: [bytes, mtime_ns, sha256]}}` for a `model.path`; with
`span_positions` if the recipe sets them, and `frozen_weights` if they were quantised. Before a run
resumes, every file is hashed (`weights.py`): bytes that rotted on the disk keep their size and
time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onellm_dist.common.checksums import hash_once
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.config.schema import ModelSection, RunConfig
from onellm_dist.model.spans.positions import read_span_positions
from onellm_dist.train.checkpoint.weights import hash_on_node, is_digest
from onellm_dist.train.distributed import Distributed

PATTERNS = ("*.safetensors", "config.json")
"""Files that the frozen weights depend on."""


def describe_source(config: RunConfig, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """Build the manifest's `frozen`.

    It hashes every weight file of `model.path` that this process has not hashed yet (seconds per
    10 GB, in the background).

    Args:
        config: the recipe.
        known: what an earlier checkpoint says; files of the same size and time are taken from it.

    Raises:
        OSError: a file cannot be read, or was written meanwhile.
    """
    model = config.model
    own: dict[str, str] = {}
    if model.span_positions is not None:
        own["span_positions"] = model.span_positions
    if config.engine.frozen_weights != "plain":
        own["frozen_weights"] = config.engine.frozen_weights
    if model.path is None:
        return {"preset": model.preset, "seed": config.run.seed, **own}
    before: dict[str, list[Any]] = (known or {}).get("files", {})
    files: dict[str, list[Any]] = {}
    for path in _list_weight_files(model.path):
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        old = before.get(path.name)
        digest = old[2] if old is not None and old[:2] == stamp else hash_once(path)
        after = path.stat()
        if [after.st_size, after.st_mtime_ns] != stamp:
            raise OSError(f"{path} was changed while the run that reads it is running")
        files[path.name] = [*stamp, digest]
    return {"path": str(model.path.resolve()), "files": files, **own}


def check_source(
    folder: Path, manifest: dict[str, Any], config: RunConfig, dist: Distributed
) -> None:
    """Refuse to resume `folder` over other frozen weights than it was trained with.

    All ranks call it together.

    Raises:
        UsageError: another preset, another seed, other files, or other rounding.
    """
    frozen = manifest.get("frozen")
    if frozen is None:  # version 1 did not record it
        return
    _check_span_positions(folder, frozen.get("span_positions"), config.model, dist)
    _check_rounding(folder, frozen.get("frozen_weights", "plain"), config.engine.frozen_weights)
    problem = _compare_preset(frozen, config) or _compare_files(frozen, config, dist)
    if problem:
        key = "path" if "path" in frozen else "preset"
        raise UsageError(
            f"checkpoint {folder} was trained over other frozen weights: {problem}",
            "a checkpoint holds only what trains; over other frozen weights it means nothing.",
            f"set model.{key}={frozen.get('path') or frozen['preset']} again, or another run.dir.",
        )


def _check_span_positions(
    folder: Path, before: str | None, model: ModelSection, dist: Distributed
) -> None:
    """Refuse to resume with a model that has other span positions, be they set or its own."""
    now = model.span_positions
    if before == now:
        return
    own = dist.ask_rank_zero(lambda: read_span_positions(model.path))
    if (before or own) != (now or own):
        raise UsageError(
            f"checkpoint {folder} was trained with model.span_positions={before or 'unset'}, now "
            f"it is {now or 'unset'}",
            "its weights belong to the former.",
            "set it as before, or another run.dir.",
        )


def _check_rounding(folder: Path, before: str, now: str) -> None:
    """Refuse to resume over frozen weights that are rounded in another way."""
    if before != now:
        raise UsageError(
            f"checkpoint {folder} was trained with engine.frozen_weights={before}, now it is {now}",
            "what trains has adapted to the rounded weights.",
            f"set engine.frozen_weights={before} again, or another run.dir.",
        )


def _compare_preset(frozen: dict[str, Any], config: RunConfig) -> str:
    if "preset" not in frozen:
        return ""
    model = config.model
    if model.preset != frozen["preset"]:
        now = f"model.path={model.path}" if model.preset is None else model.preset
        return f"model.preset was {frozen['preset']}, now {now}"
    if config.run.seed != frozen["seed"]:
        return f"run.seed was {frozen['seed']}, now {config.run.seed}"
    return ""


def _compare_files(frozen: dict[str, Any], config: RunConfig, dist: Distributed) -> str:
    if "files" not in frozen:
        return ""
    root = config.model.path
    if root is None:
        return f"model.path was {frozen['path']}, now model.preset={config.model.preset}"
    there: dict[str, list[Any]] = frozen["files"]
    problem = dist.ask_rank_zero(lambda: _compare_names(root, there))
    if problem:
        return problem
    digests = hash_on_node([root / name for name in there], dist)
    own = [
        problem
        for name, (_, _, digest) in there.items()
        if (problem := _compare_digest(name, digests[root / name], digest))
    ]
    damage = sorted({problem for problems in dist.gather(own) for problem in problems})
    return f"in {root}: {'; '.join(damage[:3])}" if damage else ""


def _compare_digest(name: str, found: str, recorded: str) -> str:
    """What is wrong with one file; "" if nothing is."""
    if not is_digest(found):
        return found
    if found == recorded:
        return ""
    return f"{name} has sha256 {found[:16]}..., the manifest says {recorded[:16]}..."


def _compare_names(root: Path, there: dict[str, list[Any]]) -> str:
    try:
        here = {path.name for path in _list_weight_files(root)}
    except OSError as error:
        return str(error)
    if here != there.keys():
        return f"{root} has other files: {', '.join(sorted(here ^ there.keys())[:3])}"
    return ""


def _list_weight_files(root: Path) -> list[Path]:
    found = sorted({path for pattern in PATTERNS for path in root.glob(pattern)})
    if not found:
        raise OneLLMError(
            f"model.path={root} has no weights",
            "the frozen weights are read from there.",
            "give a save_pretrained directory.",
        )
    return found
