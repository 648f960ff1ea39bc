"""Text after a spliced prompt: transformers' own generation, with the runs in the prefill alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GenerationConfig

from onellm_dist.common.errors import UsageError
from onellm_dist.model.padded import Spliced

REFERENCE_SHORTFALL = 2
"""Positions by which the reference's decoding falls short after a prefix (it counts 30 of the 32)."""


def generate_text(
    llm: Any,
    input_ids: torch.Tensor,
    spliced: Spliced,
    decode_offset: str,
    config: GenerationConfig,
    options: dict[str, Any],
) -> torch.Tensor:
    """Continue `input_ids` [B, S], whose prompt as the LLM reads it is `spliced`: [B, S + new] (more rows where several are asked for).

    Raises:
        UsageError: an unknown `decode_offset`, or an option that has no meaning here.
    """
    if decode_offset not in ("correct", "reference"):
        raise UsageError(
            f"decode_offset={decode_offset!r}",
            "there is no such mode.",
            "use correct or reference.",
        )
    if config.return_dict_in_generate:
        raise UsageError(
            "return_dict_in_generate is set", "generate returns token ids alone.", "leave it out."
        )
    if decode_offset == "reference" and spliced.runs:
        new = _generate_as_reference(llm, spliced, config, options)
    else:
        new = llm.generate(
            inputs_embeds=spliced.embeds,
            attention_mask=spliced.mask,
            generation_config=config,
            **options,
        )
    return torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), 0), new], dim=1)


def _generate_as_reference(
    llm: Any, spliced: Spliced, config: GenerationConfig, options: dict[str, Any]
) -> torch.Tensor:
    """The first token from a right prefill; the rest from a cache whose last two positions are gone."""
    if (config.num_return_sequences or 1) > 1 or (config.num_beams or 1) > 1:
        raise UsageError(
            "decode_offset=reference with beams or several sequences",
            "the reference has neither.",
            "ask for one sequence.",
        )
    total, least = config.max_new_tokens or 20, config.min_new_tokens or 0
    prefill = copy.deepcopy(config)
    prefill.update(
        max_new_tokens=1,
        min_new_tokens=min(least, 1) or None,
        return_dict_in_generate=True,
        use_cache=True,
    )
    first = llm.generate(
        inputs_embeds=spliced.embeds,
        attention_mask=spliced.mask,
        generation_config=prefill,
        **options,
    )
    if total == 1:
        return first.sequences
    cache = first.past_key_values
    cache.crop(-REFERENCE_SHORTFALL)
    kept = spliced.mask.shape[1] - REFERENCE_SHORTFALL
    # Ids of cached positions are never read; transformers only counts them.
    ids = torch.cat(
        [first.sequences.new_zeros((len(first.sequences), kept)), first.sequences], dim=1
    )
    mask = torch.cat([spliced.mask[:, :kept], spliced.mask.new_ones((len(ids), 1))], dim=1)
    decode = copy.deepcopy(config)
    decode.update(max_new_tokens=total - 1, min_new_tokens=max(least - 1, 0) or None)
    new = llm.generate(
        ids, attention_mask=mask, past_key_values=cache, generation_config=decode, **options
    )[:, kept:]
    ends = (
        [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or []
    )
    if ends:  # the second call does not know that a row ended with the first token
        ended = torch.isin(first.sequences, torch.tensor(ends, device=new.device))
        pad = config.pad_token_id if config.pad_token_id is not None else ends[0]
        new = torch.cat([new[:, :1], new[:, 1:].masked_fill(ended, pad)], dim=1)
    return new
