"""Prompts, and what is known of each while it is being answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from onellm_dist.modalities import SPAN_TOKENS
from onellm_dist.model.generation.media_cache import MediaCache, Medium, encode_media
from onellm_dist.model.generation.sampling import NO_TOKEN, RowSampling, make_logits_error
from onellm_dist.model.llm.per_layer import get_token_ids
from onellm_dist.model.llm.token_ids import check_tokens, count_embeddings
from onellm_dist.model.placement import get_device
from onellm_dist.model.sequence_lengths import to_device_tensor
from onellm_dist.model.spans.layout import PackedLayout

Ending = Literal["eos", "stop string", "length"]


@dataclass(frozen=True)
class Prompt:
    """What is to be continued, and how.

    Attributes:
        ids: ids of the text, BOS first.
        media: the media whose spans stand in the text, in order.
        max_new_tokens: most tokens of the answer.
        temperature: 0 takes the likeliest token; else tokens are drawn from the nucleus `top_p`.
        top_p: probability mass of the nucleus.
        seed: seed of this prompt's draws.
        places: how many tokens of the text stand before each span; (): all stand behind BOS.
    """

    ids: Sequence[int]
    media: Sequence[Medium] = ()
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    places: Sequence[int] = ()

    @property
    def positions(self) -> int:
        """Positions of text and spans."""
        return len(self.ids) + SPAN_TOKENS * len(self.media)


@dataclass(frozen=True)
class Continuation:
    """The answer to one prompt.

    Attributes:
        tokens: the new tokens, those that ended the answer included.
        ended: what ended it.
    """

    tokens: tuple[int, ...]
    ended: Ending


class AnswerRow:
    """A prompt while it is being answered.

    Args:
        place: its place among all prompts.
        prompt: the prompt.
        end_ids: tokens that end an answer.
        stop: from `place` and the new tokens so far to whether the answer ends there.
        on_token: called with `place` and each new token.
        on_logits: called with `place` and the [V] logits of each new token, before `on_token`.
        on_error: called with `place` and what keeps this row alone from continuing, which ends it;
            None: that is raised, and the rows beside it end too.
    """

    def __init__(
        self,
        place: int,
        prompt: Prompt,
        end_ids: Sequence[int],
        stop: Callable[[int, Sequence[int]], bool] | None,
        on_token: Callable[[int, int], None] | None,
        on_logits: Callable[[int, torch.Tensor], None] | None = None,
        on_error: Callable[[int, Exception], None] | None = None,
    ) -> None:
        self.place = place
        self.prompt = prompt
        self.tokens: list[int] = []
        self.ended: Ending | None = None
        self.failed = False
        """Whether `on_error` was called."""
        self._end_ids = frozenset(end_ids)
        self._stop = stop
        self._on_token = on_token
        self._on_logits = on_logits
        self._on_error = on_error
        self._generator = torch.Generator().manual_seed(prompt.seed)

    @property
    def is_going(self) -> bool:
        """Whether the row gets further tokens."""
        return self.ended is None and not self.failed

    def draw(self) -> RowSampling:
        """How the next token is chosen, with the next random number of this prompt."""
        heat = self.prompt.temperature
        if heat <= 0:
            return RowSampling()
        number = torch.rand((), generator=self._generator, dtype=torch.float64)
        return RowSampling(heat, self.prompt.top_p, float(number))

    def add(self, token: int, logits: torch.Tensor) -> None:
        """Add a token that was chosen by [V] logits, and find out whether it ends the answer.

        Args:
            token: its id, or `NO_TOKEN`.
            logits: [V].

        Raises:
            Exception: what is raised by what is called with the token, and OneLLMError if there is
                none; with `on_error` that gets it instead.
        """
        try:
            self._add(token, logits)
        except Exception as error:
            if self._on_error is None:
                raise
            self.failed = True
            self._on_error(self.place, error)

    def _add(self, token: int, logits: torch.Tensor) -> None:
        if token == NO_TOKEN:
            raise make_logits_error()
        self.tokens.append(token)
        if self._on_logits:
            self._on_logits(self.place, logits)
        if self._on_token:
            self._on_token(self.place, token)
        if token in self._end_ids:
            self.ended = "eos"
        elif self._stop and self._stop(self.place, self.tokens):
            self.ended = "stop string"
        elif len(self.tokens) >= self.prompt.max_new_tokens:
            self.ended = "length"


@dataclass(frozen=True)
class PackedPrompts:
    """Prompts as the LLM reads them, end to end."""

    sequence: torch.Tensor
    """[T, d] embeddings."""
    token_ids: torch.Tensor
    """[T], MEDIA inside a span."""
    layout: PackedLayout


def pack_prompts(
    model: Any, prompts: Sequence[Prompt], media_cache: MediaCache | None
) -> PackedPrompts:
    """Lay prompts out as one pack.

    Args:
        model: a OneLLMForConditionalGeneration.
        prompts: the prompts.
        media_cache: keeps the tokens of media.

    Raises:
        UsageError: a token that the LLM has no embedding of.
    """
    known = model.config.modalities
    media = [[m for p in prompts for m in p.media if m.modality == name] for name in known]
    tokens = encode_media(model, [m for group in media for m in group], media_cache)
    layout = PackedLayout.build(
        [len(p.ids) for p in prompts],
        [[m.modality for m in p.media] for p in prompts],
        known,
        [p.places or (1,) * len(p.media) for p in prompts],
    )
    device, embedding = get_device(model.llm), model.llm.get_input_embeddings()
    host = torch.from_numpy(np.concatenate([np.asarray(p.ids, np.int64) for p in prompts]))
    check_tokens(host, count_embeddings(embedding))
    ids = to_device_tensor(host, device)
    text = embedding(ids)
    table = torch.cat([text, *(t.to(text) for t in tokens), model.get_tags().to(text)])
    gather = to_device_tensor(layout.gather, device)
    return PackedPrompts(table.index_select(0, gather), get_token_ids(ids, gather), layout)
