"""The config beside checkpoints of formats that have no place for it.

Files of Meta and the reference hold tensors and, in params.json, some numbers of the LLM. Heads of
encoder and UPM, positions, end tokens and the like would be guessed on the way back, so `onellm
convert` writes them beside; other programs ignore the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.convert.checkpoint import OpenedCheckpoint

SIDECAR = "onellm_config.json"


def write_sidecar(folder: Path, opened: OpenedCheckpoint) -> None:
    """Write the config of a model beside its tensors.

    Args:
        folder: the folder.
        opened: the model that is written there.
    """
    content: dict[str, Any] = {"config": opened.config.to_dict()}
    if opened.generation is not None:
        content["generation_config"] = dict(opened.generation)
    text = json.dumps(content, indent=1, sort_keys=True, default=str)
    (folder / SIDECAR).write_text(text + "\n", encoding="utf-8")


def read_sidecar(folder: Path, model_type: str) -> tuple[Any, Mapping[str, Any] | None]:
    """The config and the generation settings beside a checkpoint.

    Args:
        folder: the checkpoint's folder.
        model_type: what the config must be of.

    Returns:
        (the config; None if there is no such file, the generation settings).

    Raises:
        UsageError: the file cannot be read, or is of another model.
    """
    path = folder / SIDECAR
    if not path.is_file():
        return None, None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stated, generation = dict(content["config"]), content.get("generation_config")
        kind = stated.pop("model_type")
        if kind != model_type:
            raise ValueError(f"its model_type is {str(kind)[:60]}, the checkpoint is {model_type}")
        if generation is not None and not isinstance(generation, dict):
            raise ValueError("generation_config is not an object")
        return CONFIG_MAPPING[kind](**stated), generation
    except OneLLMError as error:
        raise UsageError(f"{path}: {error.what}", error.why, "restore it.") from None
    except Exception as error:  # whatever a config of any content makes transformers raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(
            f"{path} cannot be read: {reason}",
            "heads, positions and end tokens are in it.",
            "restore it; or remove it, and give the heads by options.",
        ) from None


def refuse_contradictions(
    folder: Path, stated: Mapping[str, Any], implied: Mapping[str, Any]
) -> None:
    """Refuse a sidecar that says something else than shapes, params.json or options.

    Args:
        folder: the checkpoint's folder.
        stated: name -> value by the sidecar.
        implied: name -> value by shapes, params.json and options.

    Raises:
        UsageError: a value differs.
    """
    wrong = [
        f"{key} is {implied.get(key)}, {SIDECAR} says {stated.get(key)}"
        for key in sorted(stated.keys() | implied.keys())
        if stated.get(key) != implied.get(key)
    ]
    if wrong:
        raise UsageError(
            f"{folder}: {'; '.join(wrong)}",
            "shapes, params.json and options must agree with the config that was written beside "
            "the weights.",
            f"leave the options out; or, if these are other weights, remove {SIDECAR}.",
        )


def choose_heads(option: str, given: int | None, stated: int | None, source: object) -> int | None:
    """The heads that an option and a file give, which must not contradict each other.

    Args:
        option: the option's name, for the error.
        given: what the user gave.
        stated: what the checkpoint states.
        source: where it states that, for the error.

    Raises:
        UsageError: both are there and differ.
    """
    if given is not None and stated is not None and given != stated:
        raise UsageError(
            f"{option}={given}, but {source} says {stated}",
            "with other heads the same weights are another model.",
            "leave the option out; or correct the file, if it is of other weights.",
        )
    return given if given is not None else stated
