"""Text after a spliced prompt: transformers' own generation, with the runs in the prefill alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from onellm_dist.errors import UsageError
from onellm_dist.model.padded import Spliced

REFERENCE_SHORTFALL = 2
"""Positions by which the reference's decoding falls short after a prefix (it counts 30 of the 32)."""


def generate_text(
    llm: PreTrainedModel, input_ids: torch.Tensor, spliced: Spliced, decode_offset: str, options: dict[str, Any]
) -> torch.Tensor:
    """Continue `input_ids` [B, S], whose prompt as the LLM reads it is `spliced`: [B, S + new].

    Raises:
        UsageError: an unknown `decode_offset`, or an option that has no meaning here.
    """
    if decode_offset not in ("correct", "reference"):
        raise UsageError(f"decode_offset={decode_offset!r}", "there is no such mode.", "use correct or reference.")
    if options.get("return_dict_in_generate"):
        raise UsageError("return_dict_in_generate is set", "generate returns token ids alone.", "leave it out.")
    if decode_offset == "reference" and spliced.runs:
        new = _generate_as_reference(llm, spliced, options)
    else:
        new = llm.generate(inputs_embeds=spliced.embeds, attention_mask=spliced.mask, **options)
    return torch.cat([input_ids, new], dim=1)


def _generate_as_reference(llm: PreTrainedModel, spliced: Spliced, options: dict[str, Any]) -> torch.Tensor:
    """The first token from a right prefill; the rest from a cache whose last two positions are gone."""
    config = options.get("generation_config")
    total = options.get("max_new_tokens") or getattr(config, "max_new_tokens", None) or 20
    first = llm.generate(
        inputs_embeds=spliced.embeds,
        attention_mask=spliced.mask,
        **{**options, "max_new_tokens": 1, "return_dict_in_generate": True, "use_cache": True},
    )
    if total == 1:
        return first.sequences
    cache = first.past_key_values
    cache.crop(-REFERENCE_SHORTFALL)
    kept = spliced.mask.shape[1] - REFERENCE_SHORTFALL
    # Ids of cached positions are never read; transformers only counts them.
    ids = torch.cat([first.sequences.new_zeros((len(first.sequences), kept)), first.sequences], dim=1)
    mask = torch.cat([spliced.mask[:, :kept], spliced.mask.new_ones((len(ids), 1))], dim=1)
    rest = llm.generate(ids, attention_mask=mask, past_key_values=cache, **{**options, "max_new_tokens": total - 1})
    return rest[:, kept:]
