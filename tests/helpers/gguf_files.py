"""GGUF files of small llamas, as llama.cpp names their tensors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama, meta_state

gguf = pytest.importorskip("gguf")
NAMES = {
    "attn_q": "attention.wq",
    "attn_k": "attention.wk",
    "attn_v": "attention.wv",
    "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1",
    "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
    "attn_norm": "attention_norm",
    "ffn_norm": "ffn_norm",
}


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    """A llama's tensors under llama.cpp's names."""
    state, meta = model.state_dict(), meta_state(model)
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for i in range(2):
        for theirs, ours in NAMES.items():
            found[f"blk.{i}.{theirs}.weight"] = meta[f"layers.{i}.{ours}.weight"]
    return found


def write(
    path: Path,
    tensors: dict[str, torch.Tensor],
    change: Callable[[Any], object] = lambda writer: None,
    *,
    theta: float = 10000.0,
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(4096)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(176)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(theta)
    writer.add_vocab_size(llama().config.vocab_size)
    change(writer)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
