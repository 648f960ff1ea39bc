"""The toy LLM: the toy preset's LLM, pretrained on texts of the toy world, then frozen.

A frozen LLM has to be steerable by modality tokens. So in nearly all documents the caption follows
32 shuffled attribute words, as many positions as the span of a medium has. The LLM learns to write
a caption from whatever words are there, in whatever order. Align then only has to make tokens that
look like such words. The documents have trained combinations of attributes only.
"""

from __future__ import annotations

import json
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

EncodedText = tuple[list[int], list[int]]
"""Token ids and labels."""


@dataclass(frozen=True)
class LLMPretraining:
    """How the toy LLM is pretrained."""

    steps: int = 300
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 20
    words_first: float = 0.95
    """Share of documents with attribute words before the caption.

    The others teach which combinations occur. With a share of 0.8, an attribute that the modality
    tokens expressed faintly was taken from that prior, which has no held-out combination.
    """
    conversations: float = 0.4
    """Share of documents in the conversation format, which tune uses."""
    seed: int = 0


class ToyDocuments:
    """Endless batches of pretraining documents.

    Args:
        tokenizer: the toy preset's tokenizer.
        recipe: how the toy LLM is pretrained.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: LLMPretraining) -> None:
        self._recipe = recipe
        self._rng = np.random.default_rng(recipe.seed)
        self._corpus = world.draw_documents(self._rng)
        self._captions = TextEncoder(tokenizer, "caption", MAX_TEXT)
        self._conversations = TextEncoder(tokenizer, "conversation", MAX_TEXT)
        self._get_token = make_token_lookup(tokenizer)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield (input_ids, labels), both [B, S] int64 and padded on the right.

        All documents of a batch have the same format, so that little is padded.
        """
        while True:
            conversation = self._rng.random() < self._recipe.conversations
            documents = [
                self.encode(next(self._corpus), conversation=conversation)
                for _ in range(self._recipe.batch)
            ]
            yield pad_documents(documents)

    def encode(self, source: world.Document, *, conversation: bool) -> EncodedText:
        """Encode a document: BOS, usually 32 attribute words, and the text.

        The labels are those of training: what it supervises of the text is supervised here.

        Args:
            source: the document.
            conversation: whether its format is that of conversations.
        """
        encoder = self._conversations if conversation else self._captions
        ids, labels = encode_document(source, encoder)
        if self._rng.random() >= self._recipe.words_first:
            return ids, labels
        words = [self._get_token(word) for word in shuffle_words(source.words, self._rng)]
        return [ids[0], *words, *ids[1:]], [labels[0], *[IGNORE] * len(words), *labels[1:]]


def shuffle_words(words: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Draw SPAN_TOKENS of the words in random order, each at least once."""
    extra = rng.integers(len(words), size=SPAN_TOKENS - len(words))
    chosen = [*words, *(words[i] for i in extra)]
    return [chosen[i] for i in rng.permutation(len(chosen))]


def encode_document(source: world.Document, encoder: TextEncoder) -> EncodedText:
    """Encode a document in the encoder's format, exactly as a sample of the shards."""
    record = {"caption": source.caption, "conversations": source.conversations}
    return encoder.encode(
        {
            "txt": Part("txt", source.caption.encode()),
            "json": Part("json", json.dumps(record).encode()),
        }
    )


def pad_documents(documents: Sequence[EncodedText]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad ids and labels on the right, where causal attention never looks.

    Returns:
        Two tensors of shape [B, S].
    """
    longest = max(len(ids) for ids, _ in documents)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in documents])
    labels = [labels + [IGNORE] * (longest - len(labels)) for _, labels in documents]
    return ids, torch.tensor(labels)


def compute_cosine_rate(step: int, steps: int, warmup: int, floor: float = 0.05) -> float:
    """Share of the peak rate: linear warm-up, then half a cosine down to `floor`.

    Args:
        step: index of the step.
        steps: number of all steps.
        warmup: steps of the warm-up.
        floor: share of the peak rate at the end.
    """
    return min(1.0, (step + 1) / warmup) * (
        floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )


def pretrain_llm(
    llm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    recipe: LLMPretraining,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `llm` in place.

    Args:
        llm: the model.
        tokenizer: its tokenizer.
        recipe: how it is pretrained.
        on_step: called with the steps done and the loss after each step.

    Returns:
        The loss of every step.
    """
    optimizer = torch.optim.AdamW(
        llm.parameters(), lr=recipe.lr, betas=(0.9, 0.95), weight_decay=0.1
    )
    losses: list[float] = []
    llm.train()
    documents = ToyDocuments(tokenizer, recipe)
    for step, (ids, labels) in zip(range(recipe.steps), documents, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * compute_cosine_rate(step, recipe.steps, recipe.warmup)
        loss = llm(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step + 1, losses[-1])
    return losses


@torch.inference_mode()
def score_composition(
    llm: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, samples: int = 160, seed: int = 1
) -> float:
    """Share of held-out captions of which the LLM gets every token right.

    Each caption follows its shuffled attribute words.

    Args:
        llm: the model.
        tokenizer: its tokenizer.
        samples: number of captions.
        seed: seed of their draw.
    """
    rng = np.random.default_rng(seed)
    encoder = TextEncoder(tokenizer, "caption", MAX_TEXT)
    get_token = make_token_lookup(tokenizer)
    documents = []
    for i in range(samples):
        modality = world.MODALITIES[i % len(world.MODALITIES)]
        pool = sorted(world.get_held_out(modality))
        attributes = world.to_attributes(modality, pool[int(rng.integers(len(pool)))])
        text = world.make_caption(modality, attributes)
        words = tuple(w for w in text.split() if w in attributes.values())
        ids, labels = encode_document(world.Document(modality, words, text, ""), encoder)
        prefix = [get_token(w) for w in shuffle_words(words, rng)]
        documents.append(([ids[0], *prefix, *ids[1:]], [IGNORE] * (1 + len(prefix)) + labels[1:]))
    input_ids, targets = pad_documents(documents)
    llm.eval()
    predicted = llm(input_ids=input_ids).logits[:, :-1].argmax(-1)
    right = (predicted == targets[:, 1:]) | (targets[:, 1:] == IGNORE)
    return float(right.all(dim=1).float().mean())


def make_token_lookup(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], int]:
    """Make a function from a word to its token with the space before it.

    Every attribute word of the toy world is one token.
    """
    cache: dict[str, int] = {}

    def get_token(word: str) -> int:
        if word not in cache:
            (cache[word],) = tokenizer(f" {word}", add_special_tokens=False).input_ids
        return cache[word]

    return get_token
