"""The universal projection module: LLaMA-like experts, mixed by a router (paper, 3.2, Table 8)."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from onellm_dist.model.attention import packed_attention
from onellm_dist.model.configuration import OneLLMUPMConfig
from onellm_dist.model.kernels.activations import compute_silu_product
from onellm_dist.model.kernels.rms_norm import compute_rms_norm
from onellm_dist.model.sequence_lengths import SequenceLengths

RMS_NORM_EPS = 1e-5


class UPMNorm(nn.Module):
    """RMSNorm, computed in fp32, cast back and then scaled.

    Args:
        width: D.
    """

    fused = False
    """Whether torch's kernel runs (`model_kernels.set_kernels`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        return compute_rms_norm(x, self.weight, RMS_NORM_EPS, fused=self.fused)


class UPMAttention(nn.Module):
    """Self-attention within each sequence, without mask and without positions.

    Args:
        width: D.
        heads: H.
    """

    attend = staticmethod(packed_attention)
    """Computes attention (`compiled_blocks` puts an untraced one in its place)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, queries: torch.Tensor, x: torch.Tensor, seq_lengths: SequenceLengths
    ) -> torch.Tensor:
        """Queries [T_q, D] over x [T, D] -> [T_q, D]; the queries may be some of the rows alone."""
        width = x.shape[1]
        q, k, v = (
            y.reshape(len(y), self.heads, width // self.heads)
            for y in (self.q(queries), self.k(x), self.v(x))
        )
        attended = self.attend(q, k, v, seq_lengths).reshape(len(queries), width)
        return cast(torch.Tensor, self.out(attended))


class UPMFeedForward(nn.Module):
    """SwiGLU.

    Args:
        width: D.
        hidden: hidden channels.
    """

    fused = False
    """Whether the product of gate and input is one kernel (`model_kernels.set_kernels`)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        product = compute_silu_product(self.gate(x), self.up(x), fused=self.fused)
        return cast(torch.Tensor, self.down(product))


class UPMBlock(GradientCheckpointingLayer):
    """A pre-norm transformer block.

    Args:
        width: D.
        heads: H.
        ffn: hidden channels of the SwiGLU.
    """

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attention_norm = UPMNorm(width)
        self.attention = UPMAttention(width, heads)
        self.ffn_norm = UPMNorm(width)
        self.feed_forward = UPMFeedForward(width, ffn)

    def forward(
        self, x: torch.Tensor, seq_lengths: SequenceLengths, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, D] -> [T, D]; with `rows`, [len(rows), D].

        Args:
            x: all sequences of the pack, end to end.
            seq_lengths: where each sequence begins and ends. With `rows`, its query lengths count
                the rows of each sequence.
            rows: indices of the output rows that are computed; default: all.
        """
        normed = self.attention_norm(x)
        if rows is None:
            x = x + self.attention(normed, normed, seq_lengths)
        else:
            queries = normed.index_select(0, rows)
            x = x.index_select(0, rows) + self.attention(queries, normed, seq_lengths)
        return cast(torch.Tensor, x + self.feed_forward(self.ffn_norm(x)))


class Expert(nn.Module):
    """One projection expert: blocks without a final norm; the last computes the query rows alone.

    Args:
        width: D.
        config: config of the UPM.
    """

    def __init__(self, width: int, config: OneLLMUPMConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            UPMBlock(width, config.heads, config.ffn) for _ in range(config.blocks)
        )

    def forward(
        self,
        x: torch.Tensor,
        seq_lengths: SequenceLengths,
        last_lengths: SequenceLengths,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """[T, D] -> [len(rows), D].

        Args:
            x: all sequences of the pack, end to end.
            seq_lengths: where each sequence begins and ends.
            last_lengths: the same for the last block, whose queries are `rows` alone.
            rows: indices of the query rows.
        """
        for block in self.blocks[:-1]:
            x = block(x, seq_lengths)
        return cast(torch.Tensor, self.blocks[-1](x, last_lengths, rows))


class UPM(nn.Module):
    """All experts over one packed sequence, mixed by the routers' weights.

    Args:
        width: D.
        config: config of the UPM.
    """

    def __init__(self, width: int, config: OneLLMUPMConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(width, config) for _ in range(config.experts))

    def forward(
        self, x: torch.Tensor, router_weights: torch.Tensor, lengths: tuple[int, ...], queries: int
    ) -> torch.Tensor:
        """The query rows of every sequence, summed over experts.

        Args:
            x: [T, D], packed sequences, each with its query rows first.
            router_weights: [n * Q, E], weight of each expert for each query row.
            lengths: tokens of each of the n sequences, queries included.
            queries: Q.

        Returns:
            [n * Q, D].
        """
        seq_lengths = SequenceLengths.from_lengths(lengths, device=x.device)
        last_lengths = SequenceLengths.from_lengths(
            (queries,) * len(lengths), lengths, device=x.device
        )
        starts = last_lengths.cu_seqlens_k[:-1].long()
        rows = (starts[:, None] + torch.arange(queries, device=x.device)).flatten()
        # Experts may be on several devices (`device_map`).
        mixed = [
            router_weights[:, k : k + 1].to(x.dtype)
            * expert(x, seq_lengths, last_lengths, rows).to(x.device)
            for k, expert in enumerate(self.experts)
        ]
        return torch.stack(mixed).sum(0)


class Router(nn.Module):
    """The router of one modality: an MLP on its query tokens.

    Its weights [Q, E] do not depend on the input: for given parameters they are constant.

    Args:
        width: D.
        config: config of the UPM.
    """

    def __init__(self, width: int, config: OneLLMUPMConfig) -> None:
        super().__init__()
        self.kind = config.router
        self.experts = config.experts
        if self.kind != "constant":
            self.fc1 = nn.Linear(width, config.router_hidden)
            self.fc2 = nn.Linear(config.router_hidden, config.experts)

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """Query tokens [Q, D] -> router weights [Q, E], fp32.

        A `soft` router gives a sigmoid over its sum, as the reference's code does (the paper writes
        SoftMax). `sparse` keeps the largest of these weights alone, unscaled. `constant` is 1 / E.
        """
        if self.kind == "constant":
            return torch.full(
                (len(queries), self.experts),
                1 / self.experts,
                dtype=torch.float32,
                device=queries.device,
            )
        weights = torch.sigmoid(self.compute_logits(queries).float())
        weights = weights / weights.sum(-1, keepdim=True)
        if self.kind == "sparse":
            weights = weights * F.one_hot(weights.argmax(-1), self.experts)
        return weights

    def compute_logits(self, queries: torch.Tensor) -> torch.Tensor:
        """Query tokens [Q, D] -> [Q, E], before the sigmoid."""
        return cast(torch.Tensor, self.fc2(F.gelu(self.fc1(queries))))
