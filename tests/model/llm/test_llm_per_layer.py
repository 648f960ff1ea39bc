"""LLMs whose layers embed each token once more: with media, they are exact too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llm_families import tiny_config
from packs import relative
from test_llm_check import make_model, make_pack, make_texts

from onellm_dist.model.llm import call as llm_call
from onellm_dist.model.llm.check import check_llm
from onellm_dist.packed import PackedBatch

FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "head_dim": 8,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": 97,
        "num_kv_shared_layers": 0,
        "intermediate_size": [48, 48],
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
        "sliding_window": 6,
        "laurel_rank": 4,
        "pad_token_id": 3,
    },
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 6,
        "vocab_size_per_layer_input": 97,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 6,
        "pad_token_id": 3,
    },
}
MEDIA_ROW = {"gemma3n_text": 0, "gemma4_text": 3}
"""Id whose per-layer row a medium has in the multimodal code of the family."""


@pytest.mark.parametrize("family", FAMILIES)
def test_media_have_the_rows_of_the_familys_own_multimodal_code(family: str) -> None:
    model = make_model(tiny_config(family, **FAMILIES[family]))
    texts = make_texts()
    plain = make_pack(texts)
    generator = torch.Generator().manual_seed(5)
    pack = PackedBatch(
        plain.input_ids,
        plain.labels,
        plain.text_token_counts,
        (("imu",), (), ("imu",)),
        {"imu": torch.randn(2, 6, 400, generator=generator)},
        plain.weights,
    )
    llm = model.llm
    with torch.no_grad():
        logits, _, _ = model.compute_packed_logits(pack)
        tokens, _ = model.encode({"imu": pack.values["imu"]})
        tags = model.get_projector("imu").get_tags()
    row = torch.full((32,), MEDIA_ROW[family])
    at = 0
    for number, text in enumerate(texts):
        embeds = llm.get_input_embeddings()(text)
        ids = text
        if number != 1:
            span = torch.cat([tags[:1], tokens["imu"][number // 2], tags[1:]])
            embeds = torch.cat([embeds[:1], span, embeds[1:]])
            ids = torch.cat([text[:1], row, text[1:]])
        with torch.no_grad():
            given = (ids[None], embeds[None]) if family == "gemma4_text" else (ids[None],)
            rows = llm.model.get_per_layer_inputs(*given)
            alone = llm(inputs_embeds=embeds[None], per_layer_inputs=rows, use_cache=False).logits[
                0
            ]
        wanted = alone[-len(text) : -1]
        assert relative(logits[at : at + len(wanted)], wanted) < 1e-4
        at += len(wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_the_tokens_the_check_refuses_packs(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """The check sees that rows are left out."""
    from contextlib import nullcontext

    from onellm_dist.common.errors import UsageError
    from onellm_dist.model.llm import check as llm_check

    config = tiny_config(family, **FAMILIES[family])
    assert check_llm(config).packing == "varlen"
    monkeypatch.setenv("ONELLM_CACHE", str(tmp_path))
    monkeypatch.setattr(llm_check, "_CHECKED", {})
    monkeypatch.setattr(llm_call, "give_token_ids", lambda *_: nullcontext())
    with pytest.raises(UsageError, match="cannot be used"):
        check_llm(config)
