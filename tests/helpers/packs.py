"""Small models, packs of random samples, and the same samples one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig

from onellm_dist.modalities import all_modalities
from onellm_dist.model import OneLLMConfig, OneLLMForConditionalGeneration
from onellm_dist.model.configuration import OneLLMUPMConfig, OneLLMVisionConfig
from onellm_dist.model.initialisation import initialise
from onellm_dist.packed import IGNORE, PackedBatch

WORDS = 97


def small_model(
    seed: int = 0,
    *,
    kv_heads: int = 2,
    modalities: Sequence[str] | None = None,
    words: int = WORDS,
    llm_layers: int = 2,
    **upm: Any,
) -> OneLLMForConditionalGeneration:
    """Real token counts at tiny widths, in fp32 and ready to align (LLM and encoder frozen)."""
    config = OneLLMConfig(
        vision=OneLLMVisionConfig(width=32, layers=2, heads=2, output_dim=16),
        upm=OneLLMUPMConfig(
            **{"experts": 3, "blocks": 2, "heads": 2, "ffn": 64, "router_hidden": 48, **upm}
        ),
        text_config=LlamaConfig(
            vocab_size=words,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=llm_layers,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        ),
        modalities=modalities,
    )
    model = OneLLMForConditionalGeneration(config)
    initialise(model, seed)
    model.llm.requires_grad_(False)
    model.train()
    return model


def make_pack(
    modalities: Sequence[Sequence[str]], text_token_counts: Sequence[int], seed: int = 0
) -> PackedBatch:
    """Random texts and values; all tokens but BOS are supervised.

    The content of a sample depends on its place and `seed` alone.
    """
    ids: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in all_modalities()}
    for i, (spans, length) in enumerate(zip(modalities, text_token_counts, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        text = torch.cat(
            [torch.tensor([1]), torch.randint(3, WORDS, (length - 1,), generator=generator)]
        )
        ids.append(text)
        labels.append(torch.where(torch.arange(length) == 0, IGNORE, text))
        for name in spans:
            rows[name].append(torch.randn(all_modalities()[name].value_shape, generator=generator))
    values = {
        name: torch.stack(r) if r else torch.empty(0, *all_modalities()[name].value_shape)
        for name, r in rows.items()
    }
    return PackedBatch(
        torch.cat([torch.empty(0, dtype=torch.int64), *ids]),
        torch.cat([torch.empty(0, dtype=torch.int64), *labels]),
        tuple(text_token_counts),
        tuple(map(tuple, modalities)),
        values,
        torch.ones(len(ids)),
    )


def empty_pack() -> PackedBatch:
    """The pack of a rank without samples."""
    return PackedBatch(
        torch.tensor([1]), torch.tensor([IGNORE]), (1,), ((),), {}, torch.zeros(1), is_empty=True
    )


def one_by_one(model: OneLLMForConditionalGeneration, pack: PackedBatch) -> list[torch.Tensor]:
    """Logits [S - 1, V] of each sample's supervised tokens, from padded forwards of one sample."""
    out, start, used = [], 0, dict.fromkeys(pack.values, 0)
    for length, spans in zip(pack.text_token_counts, pack.modalities, strict=True):
        values = {}
        for name in spans:
            values[f"{name}_values"] = pack.values[name][used[name]][None]
            used[name] += 1
        logits = model(
            pack.input_ids[None, start : start + length], modality_order=spans, **values
        ).logits[0]
        out.append(logits[-length:-1] if length > 1 else logits[:0])
        start += length
    return out


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """Max |difference| / max |reference|."""
    return ((ours - reference).abs().max() / reference.abs().max()).item()
