"""What the reference of DPO was in a checkpoint, which holds neither it nor how it began.

The reference is what the run started from, and every start makes it anew: the same recipe gives the
same one. A run that trained on single texts had none; if its checkpoint were resumed with
`train.loss: dpo`, the reference would be the model from before that training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import RunConfig
from onellm_dist.config.train_sections import DPO

KEY = "reference"
"""Key of a manifest: `train.dpo.reference`; none without `train.loss: dpo`."""


def describe_reference(config: RunConfig) -> dict[str, str]:
    """Build what a manifest says of the reference; {} if there is none."""
    section = config.train.preference
    return {} if section is None else {KEY: section.reference}


def check_reference(folder: Path, manifest: dict[str, Any], config: RunConfig) -> None:
    """Refuse to resume `folder` with a reference that it was not trained against.

    Raises:
        UsageError: it had none, one of another kind, or one with other copied weights.
    """
    here = describe_reference(config).get(KEY)
    there = manifest.get(KEY)
    if here is None:
        return
    if there is None:
        raise UsageError(
            f"checkpoint {folder} was not trained with train.loss={DPO}",
            "the reference would be what that run started from, not what it has learned.",
            f"start another run (run.dir) from its exported model: model.path=<run.dir>/model; "
            f"`onellm convert run {folder} OUT` exports this checkpoint.",
        )
    if there != here:
        raise UsageError(
            f"checkpoint {folder} was trained with train.dpo.reference={there}, now it is {here}",
            "rewards are relative to the reference.",
            f"set train.dpo.reference={there} again, or another run.dir.",
        )
    now = list(config.model.init_from_image)
    before = list((manifest.get("model") or {}).get("init_from_image") or [])
    if sorted(before) != sorted(now):
        raise UsageError(
            f"checkpoint {folder} was trained with model.init_from_image={_format(before)}, now it "
            f"is {_format(now)}",
            "the reference starts as the model does, so it would be another one from here on.",
            "set it as before, or another run.dir.",
        )


def _format(names: list[str]) -> str:
    return f"[{','.join(names)}]"
