"""Where the frozen weights of a run came from: checkpoints hold the trainable state alone, and go on only over the same frozen weights.

The manifest's `frozen` is `{"preset": ..., "seed": ...}` for weights that are drawn or come with a preset, or
`{"path": ..., "files": {name: [bytes, mtime_ns, sha256]}}` for a `model.path`. Files that still have size and time are not read again;
a copy elsewhere is hashed, the files dealt over the ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.config.schema import RunConfig
from onellm_dist.train.checkpoint.files import Written, damaged, sha256_of
from onellm_dist.train.distributed import Distributed

PATTERNS = ("*.safetensors", "config.json")
"""What the frozen weights depend on."""


def describe_source(config: RunConfig, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """The manifest's `frozen`: hashes every weight file of `model.path` once (seconds a 10 GB; done in the background).

    Args:
        known: what an earlier checkpoint says; files of the same size and time are taken from it.

    Raises:
        OSError: a file cannot be read, or was written meanwhile.
    """
    model = config.model
    if model.path is None:
        return {"preset": model.preset, "seed": config.run.seed}
    before: dict[str, list[Any]] = (known or {}).get("files", {})
    files: dict[str, list[Any]] = {}
    for path in _weight_files(model.path):
        stat = path.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        old = before.get(path.name)
        digest = old[2] if old is not None and old[:2] == stamp else sha256_of(path)
        after = path.stat()
        if [after.st_size, after.st_mtime_ns] != stamp:
            raise OSError(f"{path} was changed while the run that reads it goes on")
        files[path.name] = [*stamp, digest]
    return {"path": str(model.path.resolve()), "files": files}


def check_source(
    folder: Path, manifest: dict[str, Any], config: RunConfig, dist: Distributed
) -> None:
    """Refuse to go on from `folder` over other frozen weights than it was trained with. Called by all ranks.

    Raises:
        UsageError: another preset, seed or other files.
    """
    frozen = manifest.get("frozen")
    if frozen is None:  # version 1 did not record it
        return
    problem = _other_preset(frozen, config) or _other_files(frozen, config, dist)
    if problem:
        raise UsageError(
            f"checkpoint {folder} was trained over other frozen weights: {problem}",
            "a checkpoint holds only what trains; over other frozen weights it means nothing.",
            f"give model.{'path' if 'path' in frozen else 'preset'}={frozen.get('path') or frozen['preset']} as then, or another run.dir.",
        )


def _other_preset(frozen: dict[str, Any], config: RunConfig) -> str:
    if "preset" not in frozen:
        return ""
    model = config.model
    if model.preset != frozen["preset"]:
        return f"model.preset was {frozen['preset']}, now {f'model.path={model.path}' if model.preset is None else model.preset}"
    return (
        ""
        if config.run.seed == frozen["seed"]
        else f"run.seed was {frozen['seed']}, now {config.run.seed}"
    )


def _other_files(frozen: dict[str, Any], config: RunConfig, dist: Distributed) -> str:
    if "files" not in frozen:
        return ""
    root = config.model.path
    if root is None:
        return f"model.path was {frozen['path']}, now model.preset={config.model.preset}"
    there: dict[str, list[Any]] = frozen["files"]
    problem, doubtful = _compare_stamps(root, there) if dist.is_rank_zero else ("", [])
    problem, doubtful = dist.broadcast((problem, doubtful))
    if problem:
        return problem
    found = damaged(
        [(root / name, Written(there[name][0], there[name][2])) for name in doubtful], dist
    )
    return f"in {root}: {'; '.join(found[:3])}" if found else ""


def _compare_stamps(root: Path, there: dict[str, list[Any]]) -> tuple[str, list[str]]:
    """(what is surely wrong, the files that must be hashed to know)."""
    try:
        here = {path.name: path.stat() for path in _weight_files(root)}
    except OSError as error:
        return str(error), []
    if here.keys() != there.keys():
        return f"{root} has other files: {', '.join(sorted(here.keys() ^ there.keys())[:3])}", []
    return "", [
        name for name, stat in here.items() if there[name][:2] != [stat.st_size, stat.st_mtime_ns]
    ]


def _weight_files(root: Path) -> list[Path]:
    found = sorted({path for pattern in PATTERNS for path in root.glob(pattern)})
    if not found:
        raise OneLLMError(
            f"model.path={root} has no weights",
            "the frozen weights are read from there.",
            "give a save_pretrained directory.",
        )
    return found
