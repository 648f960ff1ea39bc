"""Answers to many prompts of any length and any media, in batches.

Prompts are sorted by length, so that the rows of a batch are alike. Each batch is prefilled as one
pack, without padding, and continued one token a row (`llm/cached.py`); rows that have ended are
taken out. Answers do not depend on the batch: every prompt gets the tokens it gets alone, and
sampling draws from a generator of the prompt's own. An LLM that cannot be continued in batches
exactly answers its prompts one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.model.generation.media_cache import MediaCache, Medium
from onellm_dist.model.generation.rows import AnswerRow, Continuation, Ending, Prompt
from onellm_dist.model.generation.running_batch import MAX_POSITIONS, BatchStatistics, RunningBatch
from onellm_dist.model.generation.sampling import Choose, choose_tokens
from onellm_dist.model.llm.call import check_call
from onellm_dist.model.llm.positions import check_new_tokens, get_context

__all__ = [
    "BatchStatistics",
    "Continuation",
    "Ending",
    "MediaCache",
    "Medium",
    "Prompt",
    "TextStop",
    "check_prompts",
    "generate_batch",
    "split_batches",
]
BATCH = 16
"""Prompts that are answered together."""


class TextStop:
    """Ends an answer when its text contains a string.

    Args:
        tokenizer: the tokenizer of the LLM.
        text: the string.
    """

    TAIL_TOKENS = 8

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer = tokenizer
        self._text = text

    def __call__(self, prompt: int, tokens: Sequence[int]) -> bool:
        """Whether the answer to a prompt ends with the last of its tokens."""
        tail = self._tokenizer.decode(list(tokens[-self.TAIL_TOKENS :]), skip_special_tokens=True)
        return self._text in tail


@torch.inference_mode()
def generate_batch(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    end_ids: Sequence[int],
    stop: Callable[[int, Sequence[int]], bool] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    on_logits: Callable[[int, torch.Tensor], None] | None = None,
    batch: int = BATCH,
    max_positions: int = MAX_POSITIONS,
    media_cache: MediaCache | None = None,
    statistics: BatchStatistics | None = None,
    choose: Choose = choose_tokens,
) -> list[Continuation]:
    """Continue prompts; each gets the tokens that it gets alone.

    Args:
        model: a OneLLMForConditionalGeneration in evaluation mode.
        prompts: the prompts, in any order.
        end_ids: tokens that end an answer.
        stop: from a prompt's place and its new tokens so far to whether its answer ends there
            (`TextStop`).
        on_token: called with a prompt's place and each of its new tokens, as they come.
        on_logits: called before it, with the [V] logits that the token was chosen by.
        batch: most prompts that are continued together.
        max_positions: most positions of a batch, padding and new tokens included.
        media_cache: keeps the encoded media between calls; default: media are reused within a
            batch alone.
        statistics: added to.
        choose: chooses the next tokens; the ranks of a group choose alike.

    Returns:
        The answers, in the order of the prompts.

    Raises:
        UsageError: an empty prompt, a modality that the model does not read, no room for new
            tokens, or an LLM that cannot continue embeddings.
        OneLLMError: the LLM was changed after it was opened.
    """
    check_prompts(model, prompts)
    statistics = BatchStatistics() if statistics is None else statistics
    running = RunningBatch(model, media_cache, statistics, max_positions, choose)
    answers: dict[int, Continuation] = {}
    for places in split_batches(prompts, batch, max_positions):
        rows = [
            AnswerRow(place, prompts[place], end_ids, stop, on_token, on_logits) for place in places
        ]
        running.join(rows)
        while running.rows:
            running.step()
        statistics.prompts += len(rows)
        statistics.batches += 1
        for row in rows:
            statistics.new_tokens += len(row.tokens)
            answers[row.place] = Continuation(tuple(row.tokens), row.ended or "length")
    return [answers[place] for place in range(len(prompts))]


def split_batches(prompts: Sequence[Prompt], batch: int, max_positions: int) -> Iterator[list[int]]:
    """Split prompts into batches of similar length, the longest first.

    Args:
        prompts: the prompts.
        batch: most prompts of a batch.
        max_positions: most positions of a batch, padding and new tokens included.

    Yields:
        Places of the prompts of a batch.
    """

    def total(place: int) -> int:
        return prompts[place].positions + prompts[place].max_new_tokens

    places = sorted(range(len(prompts)), key=lambda place: (-total(place), place))
    while places:
        fitting = max(1, max_positions // total(places[0]))
        count = min(batch, fitting)
        yield places[:count]
        places = places[count:]


def check_prompts(model: Any, prompts: Sequence[Prompt]) -> None:
    """Check that prompts can be continued.

    Args:
        model: a OneLLMForConditionalGeneration.
        prompts: the prompts.

    Raises:
        UsageError: as of `generate_batch`.
        OneLLMError: as of `generate_batch`.
    """
    llm, support = model.llm, model.llm_support
    check_call(llm, support, 0)
    if not support.generation:
        raise UsageError(
            f"{type(llm).__name__} cannot generate text here",
            "it does not give the logits of its own forward when it continues embeddings, and "
            "media are embeddings.",
            "choose another LLM of the table in docs/reference/llms.md.",
        )
    context = get_context(llm.config, support)
    for place, prompt in enumerate(prompts):
        if not len(prompt.ids) or prompt.max_new_tokens < 1:
            raise UsageError(
                f"prompt {place} has {format_count(len(prompt.ids), 'token')} and asks for "
                f"{prompt.max_new_tokens} new ones",
                "there is nothing to continue.",
                "give at least BOS, and ask for at least one token.",
            )
        unknown = sorted({m.modality for m in prompt.media} - set(model.config.modalities))
        if unknown:
            raise UsageError(
                f"prompt {place} has {', '.join(unknown)}",
                f"the model reads {', '.join(model.config.modalities)}.",
                "use a model that was trained on it.",
            )
        check_new_tokens(type(llm).__name__, context, prompt.positions, prompt.max_new_tokens)
