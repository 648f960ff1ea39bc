"""Generated samples while a run trains: the model answers some validation samples as it is.

All ranks decode together, greedily, through the packed forward that trains: the same modules in the
same order, so that the collectives of every engine meet, whatever samples each rank received. Keys
and values are not cached: a token costs a forward, which is expensive only where answers are long
and many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.run_files import VALIDATION_SAMPLES
from onellm_dist.config.schema import ValidationSection
from onellm_dist.data.micro_batch import MicroBatch, SampleRef
from onellm_dist.data.plan import Plan
from onellm_dist.data.reader import Reader
from onellm_dist.data.text import STOP
from onellm_dist.data.token_budget import read_budget
from onellm_dist.modalities.base import SPAN_TOKENS
from onellm_dist.packed import IGNORE, PackedBatch
from onellm_dist.train.callbacks.base import Callback
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine
from onellm_dist.train.records.json_lines import append_lines


@dataclass
class _Question:
    """A sample of this rank while it is answered."""

    number: int
    """Position of the sample among all questions."""
    sample_id: str
    modalities: tuple[str, ...]
    prompt: list[int]
    """BOS to the token before the first answer."""
    reference: list[int]
    """The first answer, its end included."""
    readable: bool
    answer: list[int] = field(default_factory=list)
    ended: bool = False


class SampleGeneration(Callback):
    """Answers the first `generate` samples of the validation set each time the set is run.

    Answers go to `validation_samples.jsonl` and to the board.

    Args:
        config: the `data.validation` section.
        plan: its step 0 is the validation set.
        engine: runs the forward.
        tokenizer: the processor's tokenizer.
        dist: the ranks.
        run_dir: the run directory.
    """

    def __init__(
        self,
        config: ValidationSection,
        *,
        plan: Plan,
        engine: Engine,
        tokenizer: Any,
        dist: Distributed,
        run_dir: Path,
    ) -> None:
        self._config = config
        self._plan = plan
        self._engine = engine
        self._tokenizer = tokenizer
        self._dist = dist
        self._path = run_dir / VALIDATION_SAMPLES
        self._packs: list[tuple[PackedBatch, list[_Question]]] | None = None

    def on_validation(self, steps_done: int) -> None:
        for line in self.run(steps_done):
            self.trainer.callbacks.on_text(
                f"validation/{line['id']}",
                f"**{line['generated']}**\n\n(reference: {line['reference']})",
                steps_done,
            )

    @torch.no_grad()
    def run(self, steps_done: int) -> list[dict[str, Any]]:
        """Generate all answers. The model is in evaluation mode. Called by all ranks together.

        Args:
            steps_done: steps done so far.

        Returns:
            The lines that were written, on rank 0; [] elsewhere.
        """
        packs = self._load_packs()
        for batch, questions in packs:
            self._decode(batch.to(self._dist.device), questions)
        answered = [question for _, questions in packs for question in questions]
        own = [(q.number, self._build_line(steps_done, q)) for q in answered if q.readable]
        rows = [row for part in self._dist.gather(own) for row in part]
        if not self._dist.is_rank_zero:
            return []
        lines = [line for _, line in sorted(rows, key=lambda row: row[0])]
        append_lines(self._path, lines)
        return lines

    def _decode(self, batch: PackedBatch, questions: Sequence[_Question]) -> None:
        """Decode a pack; every rank has one, of questions or empty."""
        for question in questions:
            question.answer = []
            question.ended = not question.readable
        bos = self._plan.corpus.text_encoder.bos
        for _ in range(self._config.new_tokens):
            logits = self._engine.logits(_build_next(batch, questions, bos))
            # A rank without a sample has one row for its empty micro-batch.
            for question, token in zip(questions, logits.argmax(-1).tolist(), strict=False):
                self._append(question, token)
            left = torch.tensor(
                [sum(not question.ended for question in questions)], device=self._dist.device
            )
            self._dist.sum(left)
            if not int(left):
                break

    def _append(self, question: _Question, token: int) -> None:
        if question.ended:
            return
        question.answer.append(token)
        question.ended = token in (question.reference[-1], self._tokenizer.eos_token_id)

    def _build_line(self, steps_done: int, question: _Question) -> dict[str, Any]:
        return {
            "steps_done": steps_done,
            "id": question.sample_id,
            "modalities": list(question.modalities),
            "prompt": self._to_text(question.prompt[1:]),
            "reference": self._to_text(question.reference),
            "generated": self._to_text(question.answer),
        }

    def _to_text(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        if self._plan.corpus.text_encoder.text_format == "conversation":
            text = text.removesuffix(STOP)
        return text.strip()

    def _load_packs(self) -> list[tuple[PackedBatch, list[_Question]]]:
        """This rank's share of the questions, read once and kept on the host.

        The packs are those that training would make. Every rank has the same number of packs, empty
        ones at the end, since the ranks decode together.
        """
        if self._packs is None:
            rank, world_size = self._dist.rank, self._dist.world_size
            refs = self._plan.samples(0)[: self._config.generate]
            assigned = [
                _pack(self._plan, refs, range(r, len(refs), world_size), self._config.new_tokens)
                for r in range(world_size)
            ]
            count = max(map(len, assigned))
            reader = Reader(self._plan.corpus)
            self._packs = []
            own = assigned[rank] + [[]] * (count - len(assigned[rank]))
            for index, numbers in enumerate(own):
                samples = tuple(refs[n] for n in numbers)
                batch = reader.read(
                    MicroBatch(0, rank, index, count, samples, global_valid_tokens=1)
                )
                questions = _build_questions(batch, numbers)
                self._packs.append((_drop_later_media(batch, questions), questions))
        return self._packs


def _pack(
    plan: Plan, refs: Sequence[SampleRef], numbers: Sequence[int], new_tokens: int
) -> list[list[int]]:
    """Pack the samples `numbers` in their order, with answers at full length; at least one pack.

    The token budget is that of training. A sample that exceeds it alone has a pack of its own.
    """
    packs: list[list[int]] = [[]]
    llm = encoder = 0
    budget = read_budget(plan.config)
    for number in numbers:
        ref = refs[number]
        spans = plan.corpus.list_spans(ref)
        own_llm = ref.text_tokens + new_tokens + SPAN_TOKENS * len(spans)
        own_encoder = sum(plan.corpus.modalities[name].encoder_tokens for name in spans)
        if packs[-1] and (llm + own_llm > budget.llm or encoder + own_encoder > budget.encoder):
            packs.append([])
            llm = encoder = 0
        packs[-1].append(number)
        llm += own_llm
        encoder += own_encoder
    return packs


def _build_questions(batch: PackedBatch, numbers: Sequence[int]) -> list[_Question]:
    if batch.is_empty:
        return []
    found = []
    counts = list(batch.text_token_counts)
    texts = zip(batch.input_ids.split(counts), batch.labels.split(counts), strict=True)
    for i, (ids, labels) in enumerate(texts):
        targets = (labels != IGNORE).nonzero().flatten().tolist()
        start = targets[0] if targets else len(ids)
        end = next(
            (a + 1 for a, b in zip(targets, [*targets[1:], -1], strict=True) if b != a + 1), start
        )
        found.append(
            _Question(
                number=numbers[i],
                sample_id=batch.sample_ids[i],
                modalities=tuple(dict.fromkeys(batch.modalities[i])),
                prompt=ids[:start].tolist(),
                reference=ids[start:end].tolist(),
                readable=i not in batch.skipped_samples and end > start,
            )
        )
    return found


def _drop_later_media(batch: PackedBatch, questions: Sequence[_Question]) -> PackedBatch:
    """Leave out the media that stand behind the question of their sample."""
    if not batch.places:
        return batch
    modalities: list[tuple[str, ...]] = []
    places: list[tuple[int, ...]] = []
    numbers: list[tuple[int, ...]] = []
    kept: dict[str, list[bool]] = {name: [] for name in batch.values}
    all_numbers = batch.span_numbers or [(0,) * len(spans) for spans in batch.modalities]
    for question, spans, own, theirs in zip(
        questions, batch.modalities, batch.places, all_numbers, strict=True
    ):
        there = [place <= len(question.prompt) for place in own]
        for name, is_kept in zip(spans, there, strict=True):
            kept[name].append(is_kept)
        modalities.append(tuple(n for n, keep in zip(spans, there, strict=True) if keep))
        places.append(tuple(p for p, keep in zip(own, there, strict=True) if keep))
        numbers.append(tuple(n for n, keep in zip(theirs, there, strict=True) if keep))
    values = {
        name: value[torch.tensor(kept[name], dtype=torch.bool)]
        for name, value in batch.values.items()
    }
    return replace(
        batch,
        modalities=tuple(modalities),
        places=tuple(places),
        span_numbers=tuple(numbers),
        values=values,
    )


def _build_next(batch: PackedBatch, questions: Sequence[_Question], bos: int) -> PackedBatch:
    """The pack whose only supervised tokens are the next ones, one per sample, of any value.

    A rank without a sample predicts the token after its empty micro-batch.
    """
    texts = [[*question.prompt, *question.answer, bos] for question in questions] or [[bos, bos]]
    counts = tuple(map(len, texts))
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    last = torch.tensor(counts).cumsum(0) - 1
    labels = torch.full_like(ids, IGNORE)
    labels[last] = bos
    device = batch.input_ids.device
    return replace(
        batch,
        input_ids=ids.to(device),
        labels=labels.to(device),
        text_token_counts=counts,
        supervised=last.to(device),
    )
