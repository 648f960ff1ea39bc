"""The options of a call of `generate`: which decide, and which are refused."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError

_LENGTHS = {"max_length": "max_new_tokens", "min_length": "min_new_tokens"}
"""Options that count the prompt too, and those that do not."""
_DRAFT = "a draft would have to read the media too"
_MOVED = "transformers has moved it to code on the Hub, which does not know of media"
_REFUSED = {
    "assistant_model": _DRAFT,
    "assistant_early_exit": _DRAFT,
    "use_mtp": _DRAFT,
    "prompt_lookup_num_tokens": "a draft is copied from the prompt, and media cannot be copied",
    "guidance_scale": "a second prompt without the media would be run in the first one's cache",
    "negative_prompt_ids": "a second prompt would be run without the media",
    "inputs_embeds": "the prompt's embeddings are those of its text and its media",
    "position_ids": "positions are counted with the media",
    "num_beam_groups": f"group beam search: {_MOVED}",
    "diversity_penalty": f"group beam search: {_MOVED}",
    "penalty_alpha": f"contrastive search: {_MOVED}",
    "dola_layers": f"DoLa: {_MOVED}",
    "constraints": f"constrained beam search: {_MOVED}",
    "force_words_ids": f"constrained beam search: {_MOVED}",
}
"""Options of transformers that need more than the LLM's own generation, and why."""
_NEUTRAL = {"guidance_scale": 1, "num_beam_groups": 1, "diversity_penalty": 0, "penalty_alpha": 0}
"""Values that ask for nothing."""
_CACHES = {
    "quantized": "its keys and values are rounded: answers would not be those of the model",
    "paged": "it continues token ids, and media are embeddings",
}
"""Caches that cannot be used here, and why."""


def choose_settings(
    own: GenerationConfig,
    llms: GenerationConfig,
    given: dict[str, Any],
    text: int,
    device: torch.device,
) -> tuple[GenerationConfig, dict[str, Any]]:
    """Choose the settings of a call of `generate`: the caller's, the model's, the LLM's.

    Args:
        own: the model's.
        llms: the LLM's, which fill what the model's leave open.
        given: the caller's arguments without media.
        text: tokens of the prompt's text.
        device: where the LLM runs.

    Returns:
        The settings, and the arguments that are none.

    Raises:
        UsageError: an option cannot be used with media, or leaves no room for an answer.
    """
    given = dict(given)
    config = copy.deepcopy(given.pop("generation_config", None) or own)
    for name, why in _REFUSED.items():
        value = given.get(name, getattr(config, name, None))
        is_set = value is not None and value is not False
        if is_set and (name not in _NEUTRAL or value != _NEUTRAL[name]):
            raise UsageError(f"{name} is set", f"{why}.", "leave it out.")
    _check_cache(given.get("cache_implementation", config.cache_implementation), device)
    for name, value in llms.to_diff_dict().items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    for total, new in _LENGTHS.items():
        length = given.pop(total, None)
        if length is None or given.get(new) is not None:
            continue
        if total == "max_length" and length <= text:
            raise UsageError(
                f"max_length={length}, and the prompt has {format_count(text, 'token')}",
                "there is no room for an answer.",
                "give max_new_tokens.",
            )
        given[new] = max(length - text, 0) or None
    return config, config.update(**given)  # what is None here stays None


def _check_cache(name: str | None, device: torch.device) -> None:
    """Refuse a cache that cannot be used.

    Raises:
        UsageError: it cannot.
    """
    why = _CACHES.get(name or "")
    if name and "offloaded" in name and device.type == "cpu":
        why = "it moves keys and values from an accelerator to the CPU, and the model is on the CPU"
    if why:
        raise UsageError(f"cache_implementation={name!r}", f"{why}.", "leave it out.")
