"""The stand-in for LLaMA: the toy preset's LLM, pretrained on texts of the toy world, then frozen as in the paper.

What makes it steerable by modality tokens while frozen: in nearly all documents the caption comes after 32 shuffled attribute
words, as many positions as a modality's run has. The LLM learns to write a caption from whatever words stand there in
whatever order; align then only has to make tokens that look like such words. Trained combinations only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from onellm_dist.data.text import TextEncoder
from onellm_dist.modalities import SPAN_TOKENS, Part
from onellm_dist.packed import IGNORE
from onellm_dist.shards.sources.toyworld import world

MAX_TEXT = 256
"""Tokens of the longest document's text."""


@dataclass(frozen=True)
class LLMRecipe:
    """How the stand-in LLM is pretrained."""

    steps: int = 300
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 20
    words_first: float = 0.95
    """Share of documents with attribute words before the caption. The others teach which combinations occur: with 0.2 of
    them, an attribute that the modality tokens told faintly was taken from that prior, which holds no held-out combination."""
    conversations: float = 0.4
    """Share of documents in the conversation format, which tune uses."""
    seed: int = 0


class Documents:
    """Endless batches of pretraining documents."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: LLMRecipe) -> None:
        self._recipe = recipe
        self._rng = np.random.default_rng(recipe.seed)
        self._corpus = world.draw_documents(self._rng)
        self._captions = TextEncoder(tokenizer, "caption", MAX_TEXT)
        self._conversations = TextEncoder(tokenizer, "conversation", MAX_TEXT)
        self._word_id: Callable[[str], int] = _single_token(tokenizer)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(input_ids, labels), both [batch, S] int64, padded on the right; a batch is of one format, so little is padded."""
        while True:
            conversation = self._rng.random() < self._recipe.conversations
            yield pad(
                [
                    self.document(next(self._corpus), conversation=conversation)
                    for _ in range(self._recipe.batch)
                ]
            )

    def document(
        self, source: world.Document, *, conversation: bool
    ) -> tuple[list[int], list[int]]:
        """Ids and labels: BOS, maybe 32 attribute words, the text; what training supervises of the text is supervised."""
        ids, labels = encode_document(
            source, self._conversations if conversation else self._captions
        )
        if self._rng.random() >= self._recipe.words_first:
            return ids, labels
        words = [self._word_id(word) for word in shuffled_words(source.words, self._rng)]
        return [ids[0], *words, *ids[1:]], [labels[0], *[IGNORE] * len(words), *labels[1:]]


def shuffled_words(words: Sequence[str], rng: np.random.Generator) -> list[str]:
    """SPAN_TOKENS of the words, each at least once, in a random order."""
    extra = rng.integers(len(words), size=SPAN_TOKENS - len(words))
    chosen = [*words, *(words[i] for i in extra)]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def encode_document(source: world.Document, encoder: TextEncoder) -> tuple[list[int], list[int]]:
    """A document's ids and labels in the encoder's format, exactly as a sample of the shards has them."""
    import json

    record = {"caption": source.caption, "conversations": source.conversations}
    return encoder.encode(
        {
            "txt": Part("txt", source.caption.encode()),
            "json": Part("json", json.dumps(record).encode()),
        }
    )


def pad(rows: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids and labels to two [n, longest] tensors; causal attention never looks at what is added on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in rows])
    return ids, torch.tensor([row + [IGNORE] * (longest - len(row)) for _, row in rows])


def cosine(step: int, steps: int, warmup: int, floor: float = 0.05) -> float:
    """Share of the peak rate: linear warm-up, then half a cosine down to `floor`."""
    return min(1.0, (step + 1) / warmup) * (
        floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def pretrain_llm(
    llm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: LLMRecipe,
    tell: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `llm` in place; returns the loss of every step. `tell(step, loss)` is called after each."""
    optimizer = torch.optim.AdamW(
        llm.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    losses: list[float] = []
    llm.train()
    for step, (ids, labels) in zip(range(recipe.steps), Documents(tokenizer, recipe), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * cosine(step, recipe.steps, recipe.warmup)
        loss = llm(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if tell is not None:
            tell(step + 1, losses[-1])
    return losses


@torch.inference_mode()
def composition_score(
    llm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, samples: int = 160, seed: int = 1
) -> float:
    """Share of held-out captions that the LLM writes right, every token, behind their shuffled attribute words."""
    rng = np.random.default_rng(seed)
    encoder = TextEncoder(tokenizer, "caption", MAX_TEXT)
    word_id = _single_token(tokenizer)
    rows = []
    for i in range(samples):
        modality = world.MODALITIES[i % len(world.MODALITIES)]
        pool = sorted(world.get_held_out(modality))
        attributes = world.to_attributes(modality, pool[int(rng.integers(len(pool)))])
        text = world.make_caption(modality, attributes)
        words = tuple(w for w in text.split() if w in attributes.values())
        written, targets = encode_document(world.Document(modality, words, text, ""), encoder)
        prefix = [word_id(w) for w in shuffled_words(words, rng)]
        rows.append(
            ([written[0], *prefix, *written[1:]], [IGNORE] * (1 + len(prefix)) + targets[1:])
        )
    ids, labels = pad(rows)
    llm.eval()
    said = llm(input_ids=ids).logits[:, :-1].argmax(-1)
    return float(((said == labels[:, 1:]) | (labels[:, 1:] == IGNORE)).all(dim=1).float().mean())


def _single_token(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], int]:
    """Word -> its token with the space before it; every attribute word of the toy world is one token."""
    cache: dict[str, int] = {}

    def find(word: str) -> int:
        if word not in cache:
            (cache[word],) = tokenizer(f" {word}", add_special_tokens=False).input_ids
        return cache[word]

    return find
