"""Prompts that are answered together; others can join them between two tokens.

Those that join are prefilled as one pack, without padding, and become further rows of the batch
(`llm/cached.py`). Rows that have ended are taken out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from onellm_dist.model.generation.alone import continue_alone
from onellm_dist.model.generation.media_cache import MediaCache
from onellm_dist.model.generation.rows import AnswerRow, Prompt, pack_prompts
from onellm_dist.model.generation.sampling import Choose, choose_tokens
from onellm_dist.model.llm.cached import CachedRows, decode, prefill
from onellm_dist.model.llm.dropout import update_dropout
from onellm_dist.model.sequence_lengths import to_device_tensor

MAX_POSITIONS = 65536
"""Positions of all rows of a batch together, new tokens included."""


@dataclass
class BatchStatistics:
    """What the batches were made of.

    Attributes:
        prompts: prompts that were answered.
        batches: batches they were answered in.
        new_tokens: tokens of all answers.
        positions: real positions of the rows that were continued, summed over all steps.
        padding: padding positions of these rows, summed over all steps.
    """

    prompts: int = 0
    batches: int = 0
    new_tokens: int = 0
    positions: int = 0
    padding: int = 0

    @property
    def padding_share(self) -> float:
        """Share of padding in what the steps attended to."""
        total = self.positions + self.padding
        return self.padding / total if total else 0.0


class RunningBatch:
    """The rows that are being answered.

    Args:
        model: a OneLLMForConditionalGeneration in evaluation mode.
        media_cache: keeps the encoded media; None: they are reused within a call of `join` alone.
        statistics: the positions of each step are added to it.
        max_positions: most positions of all rows, padding and new tokens included.
        choose: chooses the next tokens.
    """

    def __init__(
        self,
        model: Any,
        media_cache: MediaCache | None,
        statistics: BatchStatistics,
        max_positions: int = MAX_POSITIONS,
        choose: Choose = choose_tokens,
    ) -> None:
        self.rows: list[AnswerRow] = []
        """Rows whose answers have not ended."""
        self._model = model
        self._media_cache = media_cache
        self._statistics = statistics
        self._max_positions = max_positions
        self._choose = choose
        self._cached: CachedRows | None = None
        self._device: torch.device | None = None
        """Where the LLM's logits are."""

    def has_room(self, prompts: Sequence[Prompt]) -> bool:
        """Whether prompts can join; a prompt can in any case where there is no other.

        Args:
            prompts: the prompts, all at once.
        """
        together = [*(row.prompt for row in self.rows), *prompts]
        if len(together) == 1:
            return True
        longest = max(prompt.positions + prompt.max_new_tokens for prompt in together)
        fits = longest * len(together) <= self._max_positions
        return bool(self._model.llm_support.cached) and fits

    @torch.inference_mode()
    def join(self, rows: Sequence[AnswerRow]) -> None:
        """Begin to answer prompts, beside those that are being answered.

        Each gets its first token; an LLM that cannot be continued in batches exactly answers them
        to their ends. If it fails, the other rows are what they were.

        Args:
            rows: the prompts.
        """
        update_dropout(self._model.llm)
        if not self._model.llm_support.cached:
            positions = continue_alone(self._model, rows, self._media_cache, self._choose)
            self._statistics.positions += positions
            return
        packed = pack_prompts(self._model, [row.prompt for row in rows], self._media_cache)
        logits, cached = prefill(
            self._model.llm,
            self._model.llm_support,
            packed.sequence,
            token_ids=packed.token_ids,
            lengths=packed.layout.lengths,
            position_ids=to_device_tensor(packed.layout.position_ids, packed.sequence.device),
        )
        _add_tokens(rows, logits, self._choose)
        self._device = logits.device
        going, kept = _take_out_ended(rows, cached)
        if kept is not None:
            self._cached = kept if self._cached is None else self._cached.join(kept)
        self.rows = [*self.rows, *going]

    @torch.inference_mode()
    def step(self) -> None:
        """Add a token to every row; rows that have ended or failed leave."""
        if self._cached is None or self._device is None:
            return
        cached = self._cached
        tokens = to_device_tensor([row.tokens[-1] for row in self.rows], self._device)
        logits = decode(self._model.llm, cached, tokens)
        self._statistics.positions += sum(cached.lengths)
        self._statistics.padding += cached.columns * len(self.rows) - sum(cached.lengths)
        _add_tokens(self.rows, logits, self._choose)
        self.rows, self._cached = _take_out_ended(self.rows, cached)

    def clear(self) -> None:
        """Give all rows up."""
        self.rows = []
        self._cached = None


def _add_tokens(rows: Sequence[AnswerRow], logits: torch.Tensor, choose: Choose) -> None:
    tokens = choose(logits, [row.draw() for row in rows])
    for row, token, seen in zip(rows, tokens, logits, strict=True):
        row.add(token, seen)


def _take_out_ended(
    rows: Sequence[AnswerRow], cached: CachedRows
) -> tuple[list[AnswerRow], CachedRows | None]:
    going = [at for at, row in enumerate(rows) if row.is_going]
    if not going:
        return [], None
    kept = cached if len(going) == len(rows) else cached.keep(going)
    return [rows[at] for at in going], kept
