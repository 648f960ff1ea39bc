"""The generation settings of a model folder, kept as they are.

`generation_config.json` has the tokens that end an answer, often several. transformers' own class
refuses to save some published ones (a temperature without sampling), so they are carried along as
the JSON that they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from onellm_dist.common.errors import UsageError

GENERATION = "generation_config.json"


def read_generation(folder: Path) -> dict[str, Any] | None:
    """The generation settings of a model folder; None if it has none.

    Raises:
        UsageError: they cannot be read: answers would end at the wrong token.
    """
    path = folder / GENERATION
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(
            f"{path} is not a JSON object",
            "the tokens that end an answer are in it.",
            "download it again, or remove it.",
        )
    return found


def write_generation(folder: Path, generation: Mapping[str, Any] | None, config: Any) -> None:
    """Write the generation settings of an LLM, all of its end tokens included.

    Args:
        folder: the folder.
        generation: its settings, kept as they are; None: what its config implies.
        config: the LLM's config.
    """
    if generation is None:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        return
    text = json.dumps(dict(generation), indent=2, sort_keys=True)
    (folder / GENERATION).write_text(text + "\n", encoding="utf-8")


def set_generation(model: Any, folder: Path) -> None:
    """Let a model have the generation settings of its folder, as `from_pretrained` does.

    `model.generation_settings` has them as they are, for whoever writes the model again.

    Args:
        model: a OneLLMForConditionalGeneration.
        folder: the folder that it comes from.

    Raises:
        UsageError: they cannot be read.
    """
    found = read_generation(folder)
    model.generation_settings = found
    if found is not None:
        try:
            model.generation_config = GenerationConfig.from_dict(dict(found))
        except (ValueError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{folder / GENERATION}: {(str(error).splitlines() or [type(error).__name__])[0]}",
                "the tokens that end an answer are in it.",
                "correct it, or remove it.",
            ) from None
