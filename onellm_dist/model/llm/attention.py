"""`packed_attention` as the attention implementation of transformers' causal LMs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from onellm_dist.common.errors import OneLLMError
from onellm_dist.model.attention import packed_attention
from onellm_dist.model.kernels.sdpa import build_causal_mask, compute_scores
from onellm_dist.model.sequence_lengths import SequenceLengths

ATTENTION_NAME = "onellm_varlen"
"""The name under which transformers' models find `compute_llm_attention`, their
`attn_implementation`."""


class PackedMask(torch.Tensor):
    """The placeholder [1, 1, 1, 1] that stands for the mask of a pack, with its lengths.

    transformers (5.17 to 5.23) passes a 4-D mask on as it is, also to attention modules that pass
    no other argument on. Without one it looks for restarting positions, which synchronises with
    the GPU and builds a [T, T] mask.
    """

    seq_lengths: SequenceLengths

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Keep the lengths on what models make of the mask (slices, casts)."""
        parent: Any = super()
        out = parent.__torch_function__(func, types, args, kwargs)
        lengths = getattr(args[0], "seq_lengths", None) if args else None
        if isinstance(out, cls) and lengths is not None:
            out.seq_lengths = lengths
        return out


def build_packed_mask(seq_lengths: SequenceLengths) -> PackedMask:
    """The mask of a pack."""
    device = seq_lengths.cu_seqlens_q.device
    mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device).as_subclass(PackedMask)
    mask.seq_lengths = seq_lengths
    return mask


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
        attention_mask: the mask of a padded batch, or a PackedMask.
        scaling: factor on the scores.
        dropout: probability of dropping an attention weight.
        seq_lengths: where each sequence of a pack begins and ends; None for a padded batch.
        kwargs: other arguments of transformers' attention; of these, `sliding_window`, `softcap`
            and `s_aux` (sinks) are computed.

    Returns:
        ([B, S, H, D/H], None).

    Raises:
        OneLLMError: the LLM asks for something that packed attention does not compute.
    """
    if seq_lengths is None and isinstance(attention_mask, PackedMask):
        seq_lengths = _get_lengths(attention_mask, module)
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    if seq_lengths is None:
        if softcap is not None or sinks is not None:
            return _compute_padded(
                module, query, key, value, attention_mask, scaling, softcap, sinks
            ), None
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    _check_options(module, dropout, kwargs)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    attended = packed_attention(
        q,
        k,
        v,
        seq_lengths,
        causal=True,
        scale=scaling,
        window=kwargs.get("sliding_window"),
        softcap=softcap,
        sinks=sinks,
    )
    return attended[None], None


def _get_lengths(mask: PackedMask, module: torch.nn.Module) -> SequenceLengths:
    lengths: SequenceLengths | None = getattr(mask, "seq_lengths", None)
    if lengths is None:
        raise OneLLMError(
            f"the lengths of the samples do not reach {type(module).__name__}",
            "the samples of a pack would see each other.",
            "this is a fault of onellm_dist: report the LLM.",
        )
    return lengths


def _check_options(module: torch.nn.Module, dropout: float, options: dict[str, Any]) -> None:
    unsupported = [name for name in ("position_bias",) if options.get(name) is not None]
    if dropout:
        unsupported.append(f"attention dropout {dropout}")
    if options.get("is_causal") is False:
        unsupported.append("attention that is not causal")
    if unsupported:
        raise OneLLMError(
            f"packed attention cannot compute {', '.join(unsupported)}, "
            f"which {type(module).__name__} asks for",
            "its numbers would silently differ from the LLM's own.",
            "use an LLM without it; a dropout can be set to 0 in its config.",
        )


def _compute_padded(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """A padded batch with a soft cap or sinks: [B, S, H, D/H]. SDPA has neither."""
    length = query.shape[2]
    if attention_mask is None and length > 1:
        # transformers leaves a mask out where SDPA's own causal one, aligned at the first key, says
        # the same; keys behind the queries are then empty places of a static cache.
        key, value = key[:, :, :length], value[:, :, :length]
        attention_mask = build_causal_mask(length, length, None, query.device)
    output = compute_scores(
        query, key, value, attention_mask, scale=scaling, softcap=softcap, sinks=sinks
    )
    return output.transpose(1, 2).contiguous()


AttentionInterface.register(ATTENTION_NAME, compute_llm_attention)
# Without a mask function of the same name, transformers makes no mask at all, and left-padded
# batches are silently wrong.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
