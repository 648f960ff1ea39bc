"""Answers one prompt at a time, for LLMs that are not exact as the rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from onellm_dist.model.generation.media_cache import MediaCache
from onellm_dist.model.generation.rows import AnswerRow, pack_prompts
from onellm_dist.model.generation.sampling import Choose, choose_tokens
from onellm_dist.model.llm.per_layer import give_token_ids
from onellm_dist.model.llm.rope import set_lengths
from onellm_dist.model.llm.token_ids import choose_padding, count_embeddings


class _OwnChoice(LogitsProcessor):
    """Lets transformers' greedy search take the token that a row chooses."""

    def __init__(self, row: AnswerRow, choose: Choose) -> None:
        self._row = row
        self._choose = choose

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        (token,) = self._choose(scores, [self._row.draw()])
        self._row.add(token, scores[0])
        forced = torch.full_like(scores, -torch.inf)
        forced[:, max(token, 0)] = 0  # of a row that failed, the token means nothing
        return forced


def continue_alone(
    model: Any,
    rows: Sequence[AnswerRow],
    media_cache: MediaCache | None,
    choose: Choose = choose_tokens,
) -> int:
    """Answer prompts one at a time, with the LLM's own cache.

    Args:
        model: a OneLLMForConditionalGeneration.
        rows: the prompts; they end.
        media_cache: keeps the tokens of media.
        choose: chooses the next tokens.

    Returns:
        Positions that all steps behind the prefills attended to.
    """
    llm = model.llm
    for row in rows:
        packed = pack_prompts(model, [row.prompt], media_cache)
        set_lengths(llm, None)
        config = GenerationConfig(
            max_new_tokens=row.prompt.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=choose_padding(None, None, count_embeddings(llm.get_input_embeddings())),
        )
        ids = packed.token_ids[None]
        before = llm.generation_config
        llm.generation_config = GenerationConfig()
        try:
            with give_token_ids(llm, ids):
                llm.generate(
                    inputs_embeds=packed.sequence[None],
                    attention_mask=torch.ones_like(ids),
                    generation_config=config,
                    logits_processor=LogitsProcessorList([_OwnChoice(row, choose)]),
                    stopping_criteria=StoppingCriteriaList([_make_stop(row)]),
                )
        finally:
            llm.generation_config = before
    return sum(row.prompt.positions + step for row in rows for step in range(1, len(row.tokens)))


def _make_stop(row: AnswerRow) -> Any:
    """A transformers StoppingCriteria: the row has ended, or failed."""

    def has_ended(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([not row.is_going], device=input_ids.device)

    return has_ended
