"""The universal projection module: experts of LLaMA-like blocks behind a router (paper, section 3.2 and Table 8)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from onellm_dist.model.attention import SequenceLengths, packed_attention
from onellm_dist.model.configuration import OneLLMUPMConfig

RMS_NORM_EPS = 1e-5


class UPMNorm(nn.Module):
    """RMSNorm computed in fp32, cast back, then scaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + RMS_NORM_EPS)).to(
            x.dtype
        ) * self.weight


class UPMAttention(nn.Module):
    """Self-attention without mask and without positions within each segment; queries may be some rows only."""

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
        """Queries [Tq, D] over x [T, D] -> [Tq, D]."""
        width = x.shape[1]
        q, k, v = (
            y.reshape(len(y), self.heads, width // self.heads)
            for y in (self.q(queries), self.k(x), self.v(x))
        )
        return self.out(packed_attention(q, k, v, seq_lengths).reshape(len(queries), width))


class UPMFeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, D] -> [T, D]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class UPMBlock(GradientCheckpointingLayer):
    """A pre-norm block; with `rows` it computes only these rows of its output."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attention_norm = UPMNorm(width)
        self.attention = UPMAttention(width, heads)
        self.ffn_norm = UPMNorm(width)
        self.feed_forward = UPMFeedForward(width, ffn)

    def forward(
        self, x: torch.Tensor, seq_lengths: SequenceLengths, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, D] -> [T, D], or [len(rows), D]; `seq_lengths` then has the rows' lengths as its query lengths."""
        normed = self.attention_norm(x)
        if rows is None:
            x = x + self.attention(normed, normed, seq_lengths)
        else:
            x = x.index_select(0, rows) + self.attention(
                normed.index_select(0, rows), normed, seq_lengths
            )
        return x + self.feed_forward(self.ffn_norm(x))


class Expert(nn.Module):
    """One projection expert: blocks without a final norm; the last one computes the query rows alone."""

    def __init__(self, width: int, config: OneLLMUPMConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            UPMBlock(width, config.heads, config.ffn) for _ in range(config.blocks)
        )

    def forward(
        self,
        x: torch.Tensor,
        seq_lengths: SequenceLengths,
        last: SequenceLengths,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """[T, D] -> [len(rows), D]."""
        for block in self.blocks[:-1]:
            x = block(x, seq_lengths)
        return self.blocks[-1](x, last, rows)


class UPM(nn.Module):
    """All experts over one packed sequence, mixed by the routers' gates."""

    def __init__(self, width: int, config: OneLLMUPMConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert(width, config) for _ in range(config.experts))

    def forward(
        self, x: torch.Tensor, gates: torch.Tensor, lengths: tuple[int, ...], queries: int
    ) -> torch.Tensor:
        """The query rows of every segment, summed over experts.

        Args:
            x: [T, D] packed seq_lengths, each with its `queries` query rows first.
            gates: [n * queries, E] weight of each expert for each query row.
            lengths: tokens of each of the n seq_lengths, queries included.

        Returns:
            [n * queries, D].
        """
        seq_lengths = SequenceLengths.of(lengths, device=x.device)
        last = SequenceLengths.of((queries,) * len(lengths), lengths, device=x.device)
        rows = (
            last.cu_seqlens_k[:-1].long()[:, None] + torch.arange(queries, device=x.device)
        ).flatten()
        mixed = [
            gates[:, k : k + 1].to(x.dtype) * expert(x, seq_lengths, last, rows)
            for k, expert in enumerate(self.experts)
        ]
        return torch.stack(mixed).sum(0)


class Router(nn.Module):
    """The gate of one modality: an MLP on its query tokens, hence a constant [Q, E] for given weights."""

    def __init__(self, width: int, config: OneLLMUPMConfig) -> None:
        super().__init__()
        self.kind, self.experts = config.router, config.experts
        if self.kind != "constant":
            self.fc1 = nn.Linear(width, config.router_hidden)
            self.fc2 = nn.Linear(config.router_hidden, config.experts)

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """[Q, D] -> gates [Q, E] fp32: sigmoid over its sum (the reference's code; the paper writes SoftMax).

        `sparse` keeps the largest of them alone, unscaled; `constant` is 1 / E.
        """
        if self.kind == "constant":
            return torch.full(
                (len(queries), self.experts),
                1 / self.experts,
                dtype=torch.float32,
                device=queries.device,
            )
        gates = torch.sigmoid(self.logits(queries).float())
        gates = gates / gates.sum(-1, keepdim=True)
        if self.kind == "sparse":
            gates = gates * F.one_hot(gates.argmax(-1), self.experts)
        return gates

    def logits(self, queries: torch.Tensor) -> torch.Tensor:
        """[Q, D] -> [Q, E] before the sigmoid."""
        return self.fc2(F.gelu(self.fc1(queries)))
