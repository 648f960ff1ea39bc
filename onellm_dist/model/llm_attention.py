"""`packed_attention` as the attention implementation of transformers' causal LMs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from onellm_dist.common.errors import OneLLMError
from onellm_dist.model.attention import packed_attention
from onellm_dist.model.sequence_lengths import SequenceLengths

ATTENTION_NAME = "onellm_varlen"
"""The name under which transformers' models find `compute_llm_attention`, their
`attn_implementation`."""
_UNSUPPORTED = ("softcap", "s_aux", "position_bias")
"""Arguments of transformers' attention that packed attention cannot honour."""


def compute_llm_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    seq_lengths: SequenceLengths | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' attention modules call: packed attention, or plain SDPA with its mask.

    Args:
        module: the attention module.
        query: [B, H, S, D/H]; B = 1 for a pack.
        key: [B, Hkv, S, D/H].
        value: [B, Hkv, S, D/H].
        attention_mask: the mask of a padded batch; a pack does not read it.
        scaling: factor on the scores.
        dropout: probability of dropping an attention weight.
        seq_lengths: where each sequence of a pack begins and ends; None for a padded batch.
        kwargs: other arguments of transformers' attention.

    Returns:
        ([B, S, H, D/H], None).

    Raises:
        OneLLMError: the LLM asks for something that packed attention does not compute.
    """
    if seq_lengths is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    window = kwargs.get("sliding_window")
    unsupported = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if window is not None and seq_lengths.max_seqlen_k > window:
        unsupported.append(f"sliding_window={window}")
    if dropout:
        unsupported.append(f"attention dropout {dropout}")
    if unsupported:
        raise OneLLMError(
            f"packed attention cannot compute {', '.join(unsupported)}, "
            f"which {type(module).__name__} asks for",
            "its numbers would silently differ from the LLM's own.",
            "use an LLM without it; with a sliding window, shorter sequences work too.",
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_attention(q, k, v, seq_lengths, causal=True, scale=scaling)[None], None


def build_packed_mask(device: torch.device) -> torch.Tensor:
    """A placeholder mask [1, 1, 1, 1] for the forward of a pack.

    transformers (5.17 to 5.23) passes a 4-D mask on as it is. Without one it looks for restarting
    positions, which synchronises with the GPU and builds a [T, T] mask.
    """
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)


AttentionInterface.register(ATTENTION_NAME, compute_llm_attention)
# Without a mask function of the same name, transformers makes no mask at all, and left-padded
# batches are silently wrong.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
