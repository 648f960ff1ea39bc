"""Text after a prompt with media: transformers' generation, with the spans in the prefill alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from onellm_dist.common.errors import UsageError
from onellm_dist.model.generation.sampling import make_logits_error
from onellm_dist.model.llm.call import LLMSupport, check_call, split_prompts
from onellm_dist.model.llm.per_layer import give_token_ids
from onellm_dist.model.llm.positions import check_new_tokens, get_context
from onellm_dist.model.llm.rope import set_lengths
from onellm_dist.model.llm.token_ids import choose_padding, count_embeddings
from onellm_dist.model.spans.padded import PaddedInputs

DEFAULT_NEW_TOKENS = 20
"""New tokens of transformers' `generate` where no number is given."""
REFERENCE_SHORTFALL = 2
"""Positions by which the reference's decoding falls short after a span: it counts 30 of the 32."""


def generate_text(
    llm: Any,
    support: LLMSupport,
    input_ids: torch.Tensor,
    inputs: PaddedInputs,
    decode_offset: str,
    config: GenerationConfig,
    options: dict[str, Any],
) -> Any:
    """Continue prompts: [B, S] -> [B, S + new], with more rows for several sequences a prompt.

    With `return_dict_in_generate` it is transformers' output that has them as `sequences`.

    Args:
        llm: the causal LM.
        support: how it runs exactly.
        input_ids: [B, S], the prompts' text.
        inputs: the prompts as the LLM reads them.
        decode_offset: `correct` or `reference`.
        config: generation config.
        options: further arguments of transformers' `generate`.

    Raises:
        UsageError: an unknown `decode_offset`, an option that has no meaning here, an LLM that
            cannot continue embeddings, or prompt and new tokens longer than its context.
        OneLLMError: the LLM was changed after it was opened, or gives logits that are not numbers.
    """
    _check_generation(llm, support, inputs, decode_offset, config)
    config.pad_token_id = choose_padding(
        config.pad_token_id, config.eos_token_id, count_embeddings(llm.get_input_embeddings())
    )
    like_reference = decode_offset == "reference" and inputs.media_positions
    ids = inputs.get_token_ids(input_ids)
    batches = split_prompts(support, inputs.embeds, ids, inputs.mask)
    if config.return_dict_in_generate and (like_reference or len(batches) > 1):
        raise UsageError(
            "return_dict_in_generate is set",
            "these prompts are continued in several calls, whose outputs cannot be joined.",
            "leave it out, or give one prompt and decode_offset=correct.",
        )
    processors = [_RefuseNoNumbers(), *(options.get("logits_processor") or ())]
    options = {**options, "logits_processor": LogitsProcessorList(processors)}
    parts: list[Any] = []
    with _own_config_alone(llm, config):
        for embeds, part, mask in batches:
            run = _generate_like_reference if like_reference else _generate
            with give_token_ids(llm, part):
                parts.append(run(llm, embeds, mask, config, options))
    if config.return_dict_in_generate:
        (output,) = parts
        output.sequences = _join(input_ids, output.sequences)
        return output
    return _join(input_ids, _stack(parts, config))


class _RefuseNoNumbers(LogitsProcessor):
    """Greedy search of transformers would take a token from logits that are NaN."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.amax(-1).isfinite().all():
            raise make_logits_error()
        return scores


def _check_generation(
    llm: Any,
    support: LLMSupport,
    inputs: PaddedInputs,
    decode_offset: str,
    config: GenerationConfig,
) -> None:
    check_call(llm, support, 0)
    context, prompt = get_context(llm.config, support), inputs.embeds.shape[1]
    check_new_tokens(type(llm).__name__, context, prompt, _count_new(config, prompt))
    set_lengths(llm, None)
    if not support.generation:
        raise UsageError(
            f"{type(llm).__name__} cannot generate text here",
            "it does not give the logits of its own forward when it continues embeddings, and "
            "media are embeddings.",
            "choose another LLM of the table in docs/reference/llms.md; training and scoring work.",
        )
    if decode_offset not in ("correct", "reference"):
        raise UsageError(
            f"decode_offset={decode_offset!r}",
            "there is no such mode.",
            "use correct or reference.",
        )


def _join(input_ids: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """[B * n, S + new]: prompts, and n answers to each."""
    return torch.cat([input_ids.repeat_interleave(len(new) // len(input_ids), 0), new], dim=1)


def _count_new(config: GenerationConfig, prompt: int) -> int:
    """The most new tokens; transformers takes `max_length` for prompt and new tokens together."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    if config.max_length is not None:
        return max(int(config.max_length) - prompt, 0)
    return DEFAULT_NEW_TOKENS


def _generate(
    llm: Any,
    embeds: torch.Tensor,
    mask: torch.Tensor,
    config: GenerationConfig,
    options: dict[str, Any],
) -> Any:
    return llm.generate(
        inputs_embeds=embeds, attention_mask=mask, generation_config=config, **options
    )


@contextmanager
def _own_config_alone(llm: Any, config: GenerationConfig) -> Iterator[None]:
    """Let `config` decide alone.

    transformers fills what is None in it from the LLM's own generation config, so that a caller's
    `eos_token_id=None` would be ignored.
    """
    before = llm.generation_config
    llm.generation_config = copy.deepcopy(config)
    try:
        yield
    finally:
        llm.generation_config = before


def _stack(parts: list[torch.Tensor], config: GenerationConfig) -> torch.Tensor:
    """New tokens of all prompts, [B, new]; shorter ones are padded on the right."""
    longest = max(part.shape[1] for part in parts)
    pad = config.pad_token_id
    if pad is None:
        ends = config.eos_token_id
        pad = ends if isinstance(ends, int) else (ends or [0])[0]
    return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=pad) for part in parts])


def _generate_like_reference(
    llm: Any,
    embeds: torch.Tensor,
    mask: torch.Tensor,
    config: GenerationConfig,
    options: dict[str, Any],
) -> torch.Tensor:
    """The first token from a correct prefill; the rest from a cache without its last two positions.

    Returns:
        [B, new] token ids.
    """
    if (config.num_return_sequences or 1) > 1 or (config.num_beams or 1) > 1:
        raise UsageError(
            "decode_offset=reference with beams or several sequences",
            "the reference has neither.",
            "ask for one sequence.",
        )
    total, least = config.max_new_tokens or DEFAULT_NEW_TOKENS, config.min_new_tokens or 0
    prefill = copy.deepcopy(config)
    prefill.update(
        max_new_tokens=1,
        min_new_tokens=min(least, 1) or None,
        return_dict_in_generate=True,
        use_cache=True,
    )
    first = llm.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        generation_config=prefill,
        **options,
    )
    sequences: torch.Tensor = first.sequences
    if total == 1:
        return sequences
    # transformers 5.24 calls both `cache`, and warns of the old name.
    keyword = "cache" if "cache" in {field.name for field in fields(first)} else "past_key_values"
    cache = getattr(first, keyword)
    cache.crop(-REFERENCE_SHORTFALL)
    kept = mask.shape[1] - REFERENCE_SHORTFALL
    # Ids of cached positions are never read; transformers only counts them.
    ids = torch.cat([sequences.new_zeros((len(sequences), kept)), sequences], dim=1)
    mask = torch.cat([mask[:, :kept], mask.new_ones((len(ids), 1))], dim=1)
    decode = copy.deepcopy(config)
    decode.update(max_new_tokens=total - 1, min_new_tokens=max(least - 1, 0) or None)
    new: torch.Tensor = llm.generate(
        ids, attention_mask=mask, generation_config=decode, **options, **{keyword: cache}
    )[:, kept:]
    return _mask_ended(sequences, new, config)


def _mask_ended(first: torch.Tensor, new: torch.Tensor, config: GenerationConfig) -> torch.Tensor:
    """Pad rows that ended with their first token, which the second call does not know."""
    ends = config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    if not ends:
        return new
    ended = torch.isin(first, torch.tensor(ends, device=new.device))
    pad = config.pad_token_id if config.pad_token_id is not None else ends[0]
    return torch.cat([new[:, :1], new[:, 1:].masked_fill(ended, pad)], dim=1)
