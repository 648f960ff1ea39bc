"""What a step of a recipe consists of, packed as the run itself would pack it.

A dataset that is there says which modalities its samples have. What is not known is assumed
(`assumptions.yaml`), and every assumption is named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import DataSection
from onellm_dist.data.costs import CostModel
from onellm_dist.data.media import CorpusMedia
from onellm_dist.data.micro_batch import SampleTable
from onellm_dist.data.mixture import Mixture
from onellm_dist.data.packing import ItemSizes, TokenBudget, find_too_large, pack
from onellm_dist.data.token_budget import read_budget
from onellm_dist.modalities import Modality, all_modalities
from onellm_dist.planner.hardware import load_assumptions
from onellm_dist.planner.pack_shapes import PackShape, SampleShape
from onellm_dist.shards.format.dataset import Dataset, open_dataset

EMPTY: PackShape = (SampleShape((), 1, 0),)
"""What a rank runs in a micro-batch without samples."""
_LOOKED_AT = 1000
"""Samples whose media are counted where they differ from sample to sample."""


@dataclass(frozen=True)
class DataShape:
    """The datasets of a mixture, by the shape of their samples."""

    names: tuple[str, ...]
    samples: tuple[SampleShape, ...]
    """The mean sample of each dataset."""
    weights: tuple[float, ...]
    sample_bytes: tuple[float, ...]
    """Bytes of a sample in its shard."""
    notes: tuple[str, ...]
    """What was assumed."""

    @property
    def combinations(self) -> tuple[tuple[str, ...], ...]:
        """The modality combinations, each once."""
        return tuple(dict.fromkeys(sample.spans for sample in self.samples))

    def average(self, values: Sequence[float]) -> float:
        """Mean over the samples of the mixture of a value for each dataset."""
        return float(np.average(values, weights=self.weights))


@dataclass(frozen=True)
class StepShape:
    """The first step of a run."""

    ranks: tuple[tuple[PackShape, ...], ...]
    """[world_size][micro-batches] of a rank."""

    @property
    def packs(self) -> list[PackShape]:
        """All micro-batches."""
        return [shape for rank in self.ranks for shape in rank]

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each rank."""
        return len(self.ranks[0])


def describe_data(
    data: DataSection,
    modalities: Mapping[str, Modality],
    *,
    text_tokens: int | None = None,
    known: Mapping[str, Sequence[str]] | None = None,
) -> DataShape:
    """The shape of a recipe's data.

    Args:
        data: the `data` section.
        modalities: the model's, with the token counts of its encoder.
        text_tokens: mean text tokens of a sample, BOS included; default: assumed by
            `data.text_format`.
        known: name of a dataset to its modalities, where the user says them.

    Raises:
        UsageError: a dataset's modalities are not known, or the model does not have them.
    """
    found = [_describe_dataset(data, entry, known or {}) for entry in data.mixture]
    stray = set(known or {}) - {name for name, *_ in found}
    if stray:
        raise UsageError(
            f"--modalities {sorted(stray)[0]}: data.mixture has no dataset of this name",
            "what it says would be left out of the plan.",
            f"name one of {', '.join(name for name, *_ in found)}.",
        )
    assumed = load_assumptions().text[data.text_format]
    answers = data.answers
    tokens = min(text_tokens or answers * assumed.tokens, answers * data.max_text_tokens)
    tokens = max(tokens, answers)  # each of its texts has a BOS
    targets = max(1, round(tokens * assumed.supervised / assumed.tokens)) if tokens > 1 else 0
    notes = [note for *_, note in found if note]
    if text_tokens is None:
        notes.append(
            f"texts of {format_count(tokens, 'token')}, {targets} of them supervised "
            f"({data.text_format}; --text-tokens)"
        )
    _check_modalities({name: spans for name, spans, *_ in found}, modalities)
    ordered = [
        tuple(x for x in modalities for _ in range(spans.count(x))) for _, spans, *_ in found
    ]
    return DataShape(
        names=tuple(name for name, *_ in found),
        samples=tuple(
            SampleShape(spans, tokens, min(targets, tokens - answers), answers) for spans in ordered
        ),
        weights=tuple(entry.weight for entry in data.mixture),
        sample_bytes=tuple(size for _, _, size, _ in found),
        notes=tuple(notes),
    )


def _check_modalities(
    datasets: Mapping[str, Sequence[str]], modalities: Mapping[str, Modality]
) -> None:
    """Refuse a mixture with a modality that the model does not have.

    Raises:
        UsageError: the message names each such dataset.
    """
    problems = [
        f"{name} has {', '.join(unknown)}"
        for name, spans in datasets.items()
        if (unknown := [x for x in spans if x not in modalities])
    ]
    if problems:
        raise UsageError(
            f"data.mixture: {'; '.join(problems)}; the model has {', '.join(modalities)}",
            "the model has no tokenizer for it.",
            "remove the dataset from data.mixture, or use a model with this modality.",
        )


def _describe_dataset(
    data: DataSection, entry: Any, known: Mapping[str, Sequence[str]]
) -> tuple[str, tuple[str, ...], float, str]:
    """Name, modalities and bytes a sample of a dataset, and what was assumed of it."""
    location = data.locate(entry)
    name = PurePath(str(location)).name
    assumptions = load_assumptions()
    if name not in known:
        try:
            dataset = open_dataset(location, follow_links=data.follow_links)
            shards = dataset.shards()
            size = sum(s.bytes for s in shards) / max(1, sum(s.samples for s in shards))
            spans, note = _estimate_spans(dataset, data)
            return name, spans, size, note
        except UsageError:
            pass
    spans = tuple(known.get(name, assumptions.datasets.get(name, ())))
    if name not in known and name not in assumptions.datasets:
        raise UsageError(
            f"data.mixture: no dataset {location}, and what its samples have is not known",
            "what a step costs depends on it.",
            f"correct data.root, or say it: --modalities {name}=MODALITY (text alone: {name}=).",
        )
    media = [assumptions.media.get(x, assumptions.unknown_media) for x in spans]
    note = f"{name} is not there: samples of {'+'.join(spans) or 'text'}"
    return name, spans, 1000 * sum(m.kilobytes for m in media), "" if name in known else note


def _estimate_spans(dataset: Dataset, data: DataSection) -> tuple[tuple[str, ...], str]:
    """The modality of each span of a typical sample, and what was assumed for it."""
    plain = tuple(dataset.modalities)
    modalities = {name: all_modalities()[name] for name in plain}
    shards = dataset.shards()
    media = CorpusMedia([dataset], [shards], modalities, data.spans)
    if not media.varied[0]:
        return plain, ""
    rows = np.arange(min(shards[0].samples, _LOOKED_AT), dtype=np.int64)
    zeros = np.zeros_like(rows)
    table = SampleTable(zeros, zeros, rows, zeros, zeros, zeros)
    mean = media.count(table, rows).mean(0)
    spans = tuple(name for name, n in zip(media.names, mean, strict=True) for _ in range(round(n)))
    said = ", ".join(f"{n:.1f} {name}" for name, n in zip(media.names, mean, strict=True))
    return spans, f"{dataset.name}: the spans of a sample are the mean of {len(rows)}: {said}"


def pack_step(
    data: DataSection,
    shape: DataShape,
    modalities: Mapping[str, Modality],
    *,
    world_size: int,
    budget: TokenBudget | None = None,
) -> StepShape:
    """The first step, packed as the run does.

    Args:
        data: the `data` section.
        shape: the shape of its data.
        modalities: the model's.
        world_size: number of ranks.
        budget: default: that of the recipe.

    Raises:
        UsageError: a sample is larger than a micro-batch.
    """
    budget = budget or read_budget(data)
    dataset, _ = Mixture(list(shape.weights)).locate(np.arange(data.global_batch, dtype=np.int64))
    costs = CostModel()
    spans = [[modalities[name] for name in sample.spans] for sample in shape.samples]
    llm = np.asarray([sample.llm_tokens for sample in shape.samples], dtype=np.int64)
    encoder = np.asarray([sum(m.encoder_tokens for m in s) for s in spans], dtype=np.int64)
    media = np.asarray([costs.media(s) for s in spans])
    cost = costs.samples(media, llm, answers=data.answers)
    sizes = ItemSizes(llm[dataset], encoder[dataset], cost[dataset])
    over = find_too_large(sizes, budget)
    if over is not None:
        number = int(dataset[over])
        raise UsageError(
            f"a sample of {shape.names[number]} needs {llm[number]} LLM positions and "
            f"{encoder[number]} encoder tokens; a micro-batch has {budget.llm} "
            f"(data.pack_llm_tokens) and {budget.encoder} (data.pack_encoder_tokens)",
            "a micro-batch holds whole samples, so this one does not fit in any.",
            "raise the budget that is too small.",
        )
    return StepShape(
        tuple(
            tuple(
                tuple(shape.samples[i] for i in dataset[members].tolist()) or EMPTY
                for members in rank
            )
            for rank in pack(sizes, budget, world_size)
        )
    )
