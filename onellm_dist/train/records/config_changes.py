"""What a resume changed: the keys of the recipe with their old and new values.

Hyper-parameters may change at any resume. `config_history.jsonl` keeps what they were.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from onellm_dist.common.run_files import CHECKPOINTS, CONFIG, CONFIG_HISTORY
from onellm_dist.common.secrets import mask_value
from onellm_dist.config.schema import RunConfig
from onellm_dist.train.records.json_lines import append_lines

PLACES = (("run", "dir"), ("checkpoint", "resume"))
"""Keys that say where a start reads and writes; another run's checkpoint changes them always."""
NO_KEY = object()


@dataclass(frozen=True)
class KeyChange:
    """A key of the recipe whose value is another one than before."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"

    def to_json(self) -> dict[str, Any]:
        """Return the change as an object of `events.jsonl`."""
        return {"key": self.key, "old": self.old, "new": self.new}


def read_earlier_recipe(run_dir: Path, checkpoint: Path) -> dict[str, Any] | None:
    """The recipe that a checkpoint was trained with last, as far as a run directory has it.

    Args:
        run_dir: the run directory of this start.
        checkpoint: the checkpoint that it resumes; it may be another run's.

    Returns:
        The sections; None where there is no recipe.
    """
    above = checkpoint.resolve().parent
    own = above.parent if above.name == CHECKPOINTS else run_dir
    try:
        found = yaml.safe_load((own / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def find_changes(earlier: Mapping[str, Any], config: RunConfig) -> list[KeyChange]:
    """The keys whose values differ; a key that the earlier recipe lacks had its default."""
    # As config.yaml has it: masked, so that no secret is shown, or taken for a changed one.
    # An older program may not have masked the earlier recipe.
    earlier = mask_value(earlier)
    now = mask_value(config.model_dump(mode="json", by_alias=True))
    defaults = _make_defaults(config)
    other_run = earlier.get("run", {}).get("dir") != now["run"]["dir"]
    changes = []
    for section, values in now.items():
        before = earlier.get(section)
        for key, new in values.items():
            if other_run and (section, key) in PLACES:
                continue
            old = before.get(key, NO_KEY) if isinstance(before, Mapping) else NO_KEY
            old = defaults[section][key] if old is NO_KEY else old
            if old != new and old is not NO_KEY:
                changes.append(KeyChange(f"{section}.{key}", old, new))
    return changes


def _make_defaults(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Section -> key -> default as a recipe would hold it; NO_KEY where a key is required."""
    found: dict[str, dict[str, Any]] = {}
    for name in type(config).model_fields:
        section = getattr(config, name)
        fields = type(section).model_fields
        optional = {
            key: field.get_default(call_default_factory=True)
            for key, field in fields.items()
            if not field.is_required()
        }
        dumped = type(section).model_construct(**optional).model_dump(mode="json", by_alias=True)
        found[name] = {field.alias or key: NO_KEY for key, field in fields.items()} | dumped
    return found


def append_history(run_dir: Path, first_step: int, changes: list[KeyChange]) -> None:
    """Append a line to `config_history.jsonl`: `time`, `first_step`, `changes`.

    Raises:
        OSError: the disk refuses.
    """
    line = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "first_step": first_step,
        "changes": [_mask_change(change) for change in changes],
    }
    append_lines(run_dir / CONFIG_HISTORY, [line])


def _mask_change(change: KeyChange) -> dict[str, Any]:
    values = {name: mask_value(value, change.key) for name, value in change.to_json().items()}
    return {**values, "key": change.key}
