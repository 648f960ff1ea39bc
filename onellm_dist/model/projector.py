"""The per-modality parts around encoder and UPM: tokenizer with positions; projections, queries, router and tags."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from onellm_dist.common.errors import OneLLMError
from onellm_dist.modalities import QUERY_TOKENS, get_modality
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.encoder import LAYER_NORM_EPS, Positions
from onellm_dist.model.upm import Router


class ModalityTokenizer(nn.Module):
    """A non-visual modality's tokenizer and its own learned positions (those of the encoder's prefix, the class token, included)."""

    def __init__(self, name: str, width: int, prefix: int = 1) -> None:
        super().__init__()
        modality = get_modality(name)
        embed = modality.build_tokenizer(width)
        if embed is None:
            raise OneLLMError(
                f"modality {name} is not visual but has no tokenizer",
                "its values cannot be read.",
                f"mend {name}.py.",
            )
        self.embed = embed
        self.positions = Positions(prefix + modality.tokens, width)

    def forward(
        self, values: torch.Tensor, prefix: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """[n, *value_shape] -> [n, P + L, D]; `prefix` is the encoder's."""
        return self.positions(prefix(self.embed(values)))


class LearnedRows(nn.Module):
    """A learned matrix (queries, tags), read through a forward so that ZeRO-3 gathers it."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self) -> torch.Tensor:
        """[rows, width]: a copy, because ZeRO-3 frees the parameter itself when forward returns."""
        return self.weight.clone()


class Projection(nn.Module):
    """Linear, then LayerNorm."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width_out)
        self.norm = nn.LayerNorm(width_out, eps=LAYER_NORM_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width_in] -> [..., width_out]."""
        return self.norm(self.linear(x))


class Projector(nn.Module):
    """What each modality has of its own between encoder and LLM."""

    def __init__(self, config: OneLLMConfig) -> None:
        super().__init__()
        width, llm_width = config.vision.width, config.text_config.hidden_size
        self.in_proj = Projection(width, width)
        self.queries = LearnedRows(QUERY_TOKENS, width)
        self.router = Router(width, config.upm)
        self.out_proj = Projection(width, llm_width)
        self.start_tag = LearnedRows(1, llm_width)
        self.end_tag = LearnedRows(1, llm_width)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder features [n, L, D] -> (UPM input [n, Q + L, D], gates [Q, E])."""
        n, _, width = features.shape
        queries = self.queries()
        x = torch.cat(
            [queries.to(features.dtype).expand(n, QUERY_TOKENS, width), self.in_proj(features)],
            dim=1,
        )
        return x, self.router(queries)

    def tags(self) -> torch.Tensor:
        """[2, d]: start tag, end tag."""
        return torch.cat([self.start_tag(), self.end_tag()])
