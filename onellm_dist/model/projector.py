"""The parts that each modality has of its own: tokenizer, projections, queries, router and tags."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.media_size import MOST_SPANS
from onellm_dist.modalities import QUERY_TOKENS, get_modality
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.encoder import LAYER_NORM_EPS, Positions
from onellm_dist.model.upm import Router


class ModalityTokenizer(nn.Module):
    """The tokenizer of a non-visual modality, with learned positions.

    The positions include those of the encoder's prefix (the class token).

    Args:
        name: name of the modality.
        width: D.
        prefix: P, tokens that the encoder puts before others.

    Raises:
        OneLLMError: the modality has no tokenizer.
    """

    def __init__(self, name: str, width: int, prefix: int = 1) -> None:
        super().__init__()
        modality = get_modality(name)
        embed = modality.build_tokenizer(width)
        if embed is None:
            raise OneLLMError(
                f"modality {name} is not visual but has no tokenizer",
                "its values cannot be read.",
                f"give it one in modalities/{name}.py.",
            )
        self.embed = embed
        self.positions = Positions(prefix + modality.tokens, width)

    def forward(
        self, values: torch.Tensor, prepend_prefix: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """[n, *value_shape] -> [n, P + L, D].

        Args:
            values: values of the modality.
            prepend_prefix: the encoder's method.
        """
        return cast(torch.Tensor, self.positions(prepend_prefix(self.embed(values))))


class LearnedRows(nn.Module):
    """A learned matrix (queries, tags), read through a forward so that ZeRO-3 gathers it.

    Args:
        rows: number of rows.
        width: number of columns.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self) -> torch.Tensor:
        """[rows, width]: a copy, because ZeRO-3 frees the parameter when forward returns."""
        return self.weight.clone()


class Projection(nn.Module):
    """A linear map, then LayerNorm.

    Args:
        width_in: channels of the input.
        width_out: channels of the output.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width_in, width_out)
        self.norm = nn.LayerNorm(width_out, eps=LAYER_NORM_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width_in] -> [..., width_out]."""
        return cast(torch.Tensor, self.norm(self.linear(x)))


class Projector(nn.Module):
    """What each modality has of its own between encoder and LLM.

    Args:
        config: config of the model.
    """

    def __init__(self, config: OneLLMConfig) -> None:
        super().__init__()
        width, llm_width = config.vision.width, config.text_config.hidden_size
        self.in_proj = Projection(width, width)
        self.queries = LearnedRows(QUERY_TOKENS, width)
        self.router = Router(width, config.upm)
        self.out_proj = Projection(width, llm_width)
        self.start_tag = LearnedRows(1, llm_width)
        self.end_tag = LearnedRows(1, llm_width)
        if config.span_positions == "learned":
            self.span_positions = LearnedRows(MOST_SPANS - 1, llm_width)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encoder features [n, L, D] -> (UPM input [n, Q + L, D], router weights [Q, E])."""
        n, _, width = features.shape
        queries = self.queries()
        expanded = queries.to(features.dtype).expand(n, QUERY_TOKENS, width)
        return torch.cat([expanded, self.in_proj(features)], dim=1), self.router(queries)

    def get_tags(self) -> torch.Tensor:
        """[2, d]: start tag, end tag."""
        return torch.cat([self.start_tag(), self.end_tag()])
