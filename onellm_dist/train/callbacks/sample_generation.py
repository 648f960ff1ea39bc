"""Generated samples in the course of a run: some validation samples are answered by the model as it is, sharded over its ranks.

All ranks decode together, greedily, through the packed forward that trains: the same modules in the same order, so that the collectives
of every engine meet, whatever each rank was dealt. There is no cache of keys and values: a token costs a forward, which is dear only
where answers are long and many.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from onellm_dist.config.schema import ValidationSection
from onellm_dist.data.micro_batch import MicroBatch, SampleRef
from onellm_dist.data.plan import Plan
from onellm_dist.data.reader import Reader
from onellm_dist.data.text import STOP
from onellm_dist.modalities.base import SPAN_TOKENS
from onellm_dist.packed import IGNORE, PackedBatch
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine
from onellm_dist.train.records.metrics import drop_from

SAMPLES = "validation_samples.jsonl"
Show = Callable[[str, str, int], None]


@dataclass
class _Question:
    """A sample of this rank while it is answered."""

    number: int
    """Among all that are asked."""
    sample_id: str
    modalities: tuple[str, ...]
    prompt: list[int]
    """BOS to the token before the first answer."""
    reference: list[int]
    """The first answer, its end included."""
    readable: bool
    said: list[int] = field(default_factory=list)
    ended: bool = False


class Answers:
    """Asks the first `generate` samples of the validation set. Every method is called by all ranks together.

    Args:
        plan: its step 0 is the validation set.
        first_step: lines of later steps, left by a start that went further than its last checkpoint, are dropped.
    """

    def __init__(
        self,
        config: ValidationSection,
        plan: Plan,
        engine: Engine,
        tokenizer: Any,
        dist: Distributed,
        run_dir: Path,
        *,
        first_step: int,
    ) -> None:
        self._config, self._plan, self._engine, self._tokenizer, self._dist = (
            config,
            plan,
            engine,
            tokenizer,
            dist,
        )
        self._path = run_dir / SAMPLES
        self._read: list[tuple[PackedBatch, list[_Question]]] | None = None
        if dist.is_rank_zero:
            drop_from(self._path, first_step + 1)

    @torch.no_grad()
    def run(self, done: int, show: Show | None = None) -> None:
        """Answer after `done` steps; `show` gets name, text and step of each on rank 0. The model is in eval mode."""
        packs = self._asked()
        for batch, questions in packs:
            self._answer(batch.to(self._dist.device), questions)
        asked = [question for _, questions in packs for question in questions if question.readable]
        rows = [
            row for own in self._dist.gather([self._row(done, q) for q in asked]) for row in own
        ]
        if self._dist.is_rank_zero:
            self._write(done, sorted(rows, key=lambda row: row[0]), show)

    def _answer(self, batch: PackedBatch, questions: Sequence[_Question]) -> None:
        """Decode a pack; every rank has one, of questions or a dummy."""
        for question in questions:
            question.said, question.ended = [], not question.readable
        for _ in range(self._config.new_tokens):
            logits = self._engine.logits(
                _next(batch, questions, self._plan.corpus.text_encoder.bos)
            )
            for question, token in zip(
                questions, logits.argmax(-1).tolist(), strict=False
            ):  # a rank without a sample has a dummy row
                self._take(question, token)
            left = torch.tensor(
                [sum(not question.ended for question in questions)], device=self._dist.device
            )
            self._dist.sum(left)
            if not int(left):
                break

    def _take(self, question: _Question, token: int) -> None:
        if question.ended:
            return
        question.said.append(token)
        question.ended = token in (question.reference[-1], self._tokenizer.eos_token_id)

    def _row(self, done: int, question: _Question) -> tuple[int, dict[str, Any]]:
        line = {
            "step": done,
            "id": question.sample_id,
            "modalities": list(question.modalities),
            "prompt": self._text(question.prompt[1:]),
            "reference": self._text(question.reference),
            "generated": self._text(question.said),
        }
        return question.number, line

    def _text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return (
            text.removesuffix(STOP).strip()
            if self._plan.corpus.text_encoder.text_format == "conversation"
            else text.strip()
        )

    def _write(
        self, done: int, rows: Sequence[tuple[int, dict[str, Any]]], show: Show | None
    ) -> None:
        with self._path.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for _, line in rows)
        for _, line in rows if show else ():
            assert show is not None
            show(
                f"validation/{line['id']}",
                f"**{line['generated']}**\n\n(reference: {line['reference']})",
                done,
            )

    def _asked(self) -> list[tuple[PackedBatch, list[_Question]]]:
        """This rank's share of the samples, read once, on the host: packs as training would have them, and what is asked in each.

        Every rank has as many packs, dummies at the end, for they decode together.
        """
        if self._read is None:
            refs, rank, size = (
                self._plan.samples(0)[: self._config.generate],
                self._dist.rank,
                self._dist.world_size,
            )
            dealt = [
                _packs(self._plan, refs, range(r, len(refs), size), self._config.new_tokens)
                for r in range(size)
            ]
            count = max(map(len, dealt))
            reader = Reader(self._plan.corpus)
            self._read = []
            for index, numbers in enumerate(dealt[rank] + [[]] * (count - len(dealt[rank]))):
                batch = reader.read(
                    MicroBatch(
                        0,
                        rank,
                        index,
                        count,
                        tuple(refs[n] for n in numbers),
                        global_valid_tokens=1,
                    )
                )
                self._read.append((batch, _questions(batch, numbers)))
        return self._read


def _packs(
    plan: Plan, refs: Sequence[SampleRef], numbers: Sequence[int], new_tokens: int
) -> list[list[int]]:
    """The samples `numbers` in their order, in packs under the budget of training with the answers at full length; at least one pack.

    A sample whose answer alone goes over a cap has a pack of its own.
    """
    packs: list[list[int]] = [[]]
    llm = encoder = 0
    for number in numbers:
        ref = refs[number]
        spans = plan.corpus.spans[ref.dataset]
        own_llm = ref.text_tokens + new_tokens + SPAN_TOKENS * len(spans)
        own_encoder = sum(plan.corpus.modalities[name].encoder_tokens for name in spans)
        if packs[-1] and (
            llm + own_llm > plan.config.pack_llm_tokens
            or encoder + own_encoder > plan.config.pack_encoder_tokens
        ):
            packs.append([])
            llm = encoder = 0
        packs[-1].append(number)
        llm, encoder = llm + own_llm, encoder + own_encoder
    return packs


def _questions(batch: PackedBatch, numbers: Sequence[int]) -> list[_Question]:
    if batch.is_empty:
        return []
    found = []
    lengths = list(batch.text_token_counts)
    for i, (ids, labels) in enumerate(
        zip(batch.input_ids.split(lengths), batch.labels.split(lengths), strict=True)
    ):
        targets = (labels != IGNORE).nonzero().flatten().tolist()
        start = targets[0] if targets else len(ids)
        end = next(
            (a + 1 for a, b in zip(targets, [*targets[1:], -1], strict=True) if b != a + 1), start
        )
        readable = i not in batch.skipped_samples and end > start
        prompt, reference = ids[:start].tolist(), ids[start:end].tolist()
        found.append(
            _Question(
                numbers[i], batch.sample_ids[i], batch.modalities[i], prompt, reference, readable
            )
        )
    return found


def _next(batch: PackedBatch, questions: Sequence[_Question], bos: int) -> PackedBatch:
    """The pack whose only supervised tokens are those to come: one a sample, of any value (a rank without a sample: after its dummy)."""
    texts = [[*question.prompt, *question.said, bos] for question in questions] or [[bos, bos]]
    lengths = tuple(map(len, texts))
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    last = torch.tensor(lengths).cumsum(0) - 1
    labels = torch.full_like(ids, IGNORE)
    labels[last] = bos
    device = batch.input_ids.device
    return replace(
        batch,
        input_ids=ids.to(device),
        labels=labels.to(device),
        text_token_counts=lengths,
        supervised=last.to(device),
    )
