"""Run directories and checkpoints of 0.1.0: refused, with the old and the new names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from onellm_dist.common.errors import UsageError
from onellm_dist.common.run_files import (
    CHECKPOINT_MANIFEST,
    CHECKPOINT_PREFIX,
    CHECKPOINTS,
    CONFIG,
    DATA_PHASES,
    EXCLUDED,
    SAMPLES,
    SKIPPED_INHERITED,
)
from onellm_dist.config.old_keys import explain_old_key

RENAMED_FILES: Mapping[str, str] = {
    "ledger": f"{SAMPLES}/",
    "ledger/segments.json": f"{SAMPLES}/{DATA_PHASES}",
    "ledger/tombstones-ranks-guard.jsonl": f"{SAMPLES}/{EXCLUDED}",
    "ledger/tombstones-ranks-source.jsonl": f"{SAMPLES}/{SKIPPED_INHERITED}",
    "ledger/tombstones-rank[0-9]*.jsonl": f"{SAMPLES}/skipped-rank*.jsonl",
}
"""File or folder of a run directory of 0.1.0, or a pattern of such -> its name today."""
RENAMED_ENTRIES: Mapping[str, str] = {
    "segments": "data_phases",
    "guard": "stability",
    "step": "steps_done",
    "world": "world_size",
}
"""Entry of a checkpoint manifest of 0.1.0 -> its name today."""


class OldRunError(UsageError):
    """A run directory is of 0.1.0."""


def check_run_directory(run_dir: Path) -> None:
    """Refuse a run directory of 0.1.0.

    Raises:
        OldRunError: the directory has files, keys or checkpoints of 0.1.0; the message has the old
            and the new names.
    """
    found = [
        f"{name.replace('[0-9]*', '*')} is called {new} now"
        for name, new in RENAMED_FILES.items()
        if any(run_dir.glob(name))
    ]
    found += [f"{CONFIG}: {text}" for text in _find_old_keys(run_dir / CONFIG)]
    for path in sorted((run_dir / CHECKPOINTS).glob(f"{CHECKPOINT_PREFIX}*/{CHECKPOINT_MANIFEST}")):
        found += find_old_entries(_read_json(path))
    if found:
        raise OldRunError(
            f"{run_dir} is a run of onellm_dist 0.1.0:\n"
            + "\n".join(f"  - {text}" for text in dict.fromkeys(found)),
            "this version would not find its records and could not resume it exactly.",
            "finish or report it with onellm_dist 0.1.0; or start a new run: another run.dir, and "
            "model.path set to the model that it exported.",
        )


def check_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of 0.1.0.

    Args:
        folder: the checkpoint.
        manifest: its manifest.

    Raises:
        UsageError: the manifest has entries of 0.1.0.
    """
    found = find_old_entries(manifest)
    if found:
        raise UsageError(
            f"checkpoint {folder} was written by onellm_dist 0.1.0: {'; '.join(found)}",
            "this version could not resume it exactly.",
            "finish its run with onellm_dist 0.1.0, or set model.path to the model that the run "
            "exported.",
        )


def find_old_entries(manifest: Mapping[str, Any]) -> list[str]:
    """A text for each entry of a checkpoint manifest that was renamed since 0.1.0."""
    return [
        f"{CHECKPOINT_MANIFEST}: {name} is called {new} now"
        for name, new in RENAMED_ENTRIES.items()
        if name in manifest
    ]


def _find_old_keys(path: Path) -> list[str]:
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    if not isinstance(recipe, dict):
        return []
    found: list[str] = []
    for section, keys in recipe.items():
        found += explain_old_key(str(section), keys)
        for key, value in keys.items() if isinstance(keys, dict) else ():
            found += explain_old_key(f"{section}.{key}", value)
    return list(dict.fromkeys(found))


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
