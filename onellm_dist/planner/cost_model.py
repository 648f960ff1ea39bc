"""What a micro-batch of any size does, from a few that were counted.

Each operation of a part moves bytes and computes FLOPs that depend linearly on the sums of
`PackSizes` that this part sees; attention's FLOPs depend on its pairs of query and key, too.
A few counted micro-batches of independent sizes determine the coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onellm_dist.modalities import Modality
from onellm_dist.planner.counting import ATTENTION, OperationKey, PackCount, Work, count_pack
from onellm_dist.planner.module_labels import (
    EMBEDDING,
    GLUE,
    HEAD,
    LLM,
    TOKENIZED,
    UPM,
    VISUAL,
)
from onellm_dist.planner.pack_shapes import (
    PackShape,
    PackSizes,
    SampleShape,
    make_meta_batch,
    measure_sizes,
)
from onellm_dist.train.engine.description import WeightUses

Floats = NDArray[np.float64]
PHASES = ("forward", "recompute", "backward")
DEPENDS_ON: dict[str, tuple[str, ...]] = {
    VISUAL: ("frames",),
    TOKENIZED: ("tokenized",),
    UPM: ("upm", "spans"),
    EMBEDDING: ("text",),
    LLM: ("positions", "supervised"),
    HEAD: ("supervised",),
    f"{GLUE}.start": ("frames", "pixels", "tokenized"),
    f"{GLUE}.{VISUAL}": ("frames", "spans.visual", "tokenized"),
    f"{GLUE}.{TOKENIZED}": ("tokenized", "upm", "spans"),
    f"{GLUE}.{UPM}": ("spans",),
    f"{GLUE}.{EMBEDDING}": ("text", "spans", "supervised"),
    f"{GLUE}.{LLM}": ("supervised", "text"),
}
"""Part -> the sums that its operations depend on, beside a constant."""
PAIRS = {VISUAL: "pairs.visual", TOKENIZED: "pairs.tokenized", UPM: "pairs.upm", LLM: "pairs.llm"}
"""Part -> the sum of the pairs of its attention."""
RUNS = 4
"""Micro-batches that are counted; no operation depends on more sums, the constant included."""


def list_sums(part: str) -> tuple[str, ...]:
    """The sums that a part depends on, the constant `one` first."""
    if part.startswith("modality."):
        return "one", f"spans.{part.removeprefix('modality.')}"
    return "one", *DEPENDS_ON.get(part, ("text", "spans", "supervised"))


@dataclass(frozen=True)
class OperationGroup:
    """Operations of a part and phase: how they depend on the sums of a micro-batch."""

    part: str
    phase: str
    names: tuple[str, ...]
    """Name of each operation, n of them."""
    width: Floats
    """[n] shortest dimension of a matrix product that weights decide; inf for other operations."""
    tokens: Floats
    """[sums, n] coefficients of its dimension that the micro-batch decides."""
    flops: Floats
    """[sums, n] coefficients, in the order of `list_sums`."""
    moved: Floats
    """[sums, n] coefficients of the bytes."""
    pairs: Floats
    """[n] FLOPs of an attention kernel per pair of query and key; 0 for others."""
    repeats: Floats
    """[n] how many equal operations each stands for (the layers of a stack are equal)."""

    def measure_products(self, sizes: PackSizes) -> Floats:
        """Shortest dimension of each matrix product, [n]; inf for other operations."""
        tokens = np.asarray([sizes.get(name) for name in list_sums(self.part)]) @ self.tokens
        return np.minimum(self.width, np.where(tokens > 0.5, tokens, np.inf))

    def evaluate(self, sizes: PackSizes) -> tuple[Floats, Floats]:
        """FLOPs and bytes of each operation, [n] each, in a micro-batch of these sizes."""
        values = np.asarray([sizes.get(name) for name in list_sums(self.part)])
        pairs = sizes.get(PAIRS.get(self.part, ""))
        flops = values @ self.flops + pairs * self.pairs
        return np.maximum(flops, 0.0), np.maximum(values @ self.moved, 0.0)


@dataclass(frozen=True)
class PackCostModel:
    """What forward and backward of any micro-batch of a mixture do and keep."""

    groups: tuple[OperationGroup, ...]
    kept: Mapping[str, Floats]
    """Part -> coefficients of the bytes that are kept for backward."""
    calls: Mapping[str, float]
    """Calls of ATen operations by phase."""
    modules: Mapping[str, float]
    """Calls of modules by phase."""
    uses: WeightUses
    """Weights that a micro-batch reads."""

    def count_kept(self, sizes: PackSizes) -> dict[str, float]:
        """Bytes of activations that are kept for backward, by part."""
        return {
            part: max(0.0, float(np.dot([sizes.get(n) for n in list_sums(part)], coefficients)))
            for part, coefficients in self.kept.items()
        }

    def count_flops(self, sizes: PackSizes, *, recompute: bool = True) -> float:
        """FLOPs of a micro-batch, with or without those of recomputation."""
        return float(
            sum(
                (group.evaluate(sizes)[0] * group.repeats).sum()
                for group in self.groups
                if recompute or group.phase != "recompute"
            )
        )


def make_trial_packs(
    combinations: Sequence[tuple[str, ...]], *, answers: int = 1
) -> list[PackShape]:
    """Micro-batches whose sums are independent, with every combination in each.

    Args:
        combinations: modality combinations of the mixture.
        answers: texts of a sample (`SampleShape`).
    """
    packs = []
    for run in range(RUNS):
        samples = []
        for number, spans in enumerate(combinations):
            count = (2, 5, 3, 7)[(run + number * number) % RUNS] + (run * number) % 3
            text = (24, 24, 40, 33)[run] + 2 * number
            targets = text - (1, 9, 5, 17)[run]
            sizes = answers * text, answers * targets, answers
            samples += [SampleShape(spans, *sizes)] * count
        packs.append(tuple(samples))
    return packs


def build_cost_model(
    model: Any, combinations: Sequence[tuple[str, ...]], modalities: Mapping[str, Modality]
) -> PackCostModel:
    """Count a few small micro-batches, and find how their work depends on their sizes.

    Args:
        model: a OneLLM on the meta device, prepared for its stage.
        combinations: modality combinations of the mixture.
        modalities: the model's, with the token counts of its encoder.
    """
    packs = make_trial_packs(combinations, answers=2 if model.preference is not None else 1)
    counts = [count_pack(model, make_meta_batch(pack, list(modalities.values()))) for pack in packs]
    sizes = [measure_sizes(pack, modalities) for pack in packs]
    kept = {
        part: _solve(list_sums(part), sizes, np.asarray([[c.kept.get(part, 0)] for c in counts]))[
            :, 0
        ]
        for part in sorted({part for count in counts for part in count.kept})
    }
    calls, modules = (
        {phase: float(np.mean([x.get(phase, 0) for x in numbers])) for phase in PHASES}
        for numbers in ([c.calls for c in counts], [c.modules for c in counts])
    )
    return PackCostModel(_build_groups(counts, sizes), kept, calls, modules, counts[0].uses)


def _build_groups(
    counts: Sequence[PackCount], sizes: Sequence[PackSizes]
) -> tuple[OperationGroup, ...]:
    by_group: dict[tuple[str, str], dict[OperationKey, None]] = {}
    for count in counts:
        for key in count.operations:
            by_group.setdefault((key.part, key.phase), {})[key] = None
    return tuple(
        _build_group(part, phase, list(keys), counts, sizes)
        for (part, phase), keys in by_group.items()
    )


def _build_group(
    part: str,
    phase: str,
    keys: Sequence[OperationKey],
    counts: Sequence[PackCount],
    sizes: Sequence[PackSizes],
) -> OperationGroup:
    nothing = Work(0.0, 0.0, ())
    table = [[count.operations.get(key, nothing) for key in keys] for count in counts]
    flops = np.asarray([[work.flops for work in row] for row in table])
    moved = np.asarray([[work.bytes for work in row] for row in table])
    width, tokens = _split_shapes(table)
    attention = np.asarray([key.name in ATTENTION for key in keys], dtype=bool)
    solved_flops, pairs = _solve(list_sums(part), sizes, flops), np.zeros(len(keys))
    if attention.any():
        # Blocks that compute some queries alone depend on tokens, all others on pairs.
        found = _solve((*list_sums(part), PAIRS[part]), sizes, flops[:, attention])
        solved_flops[:, attention], pairs[attention] = found[:-1], found[-1]
    solved = [solved_flops, *(_solve(list_sums(part), sizes, x) for x in (moved, tokens))]
    columns = np.vstack([*solved, pairs, width])
    names = np.asarray([key.name for key in keys])
    return _merge(part, phase, names, columns, len(list_sums(part)))


def _split_shapes(table: Sequence[Sequence[Work]]) -> tuple[Floats, Floats]:
    """The dimensions of matrix products that are equal in all runs, and those that are not.

    Returns:
        ([n] the shortest that is equal, 0 for other operations; [runs, n] the one that is not).
    """
    n = len(table[0])
    width, tokens = np.zeros(n), np.zeros((len(table), n))
    for column in range(n):
        shapes = {row[column].shape for row in table}
        if shapes == {()} or () in shapes:
            continue
        dimensions = list(zip(*(row[column].shape for row in table), strict=True))
        equal = [d[0] for d in dimensions if len(set(d)) == 1]
        others = [d for d in dimensions if len(set(d)) > 1]
        width[column] = min(equal, default=0)
        if others:
            tokens[:, column] = others[0]
    return width, tokens


def _merge(
    part: str, phase: str, names: NDArray[Any], columns: Floats, sums: int
) -> OperationGroup:
    """One operation for all equal ones."""
    _, codes = np.unique(names, return_inverse=True)
    scale = np.maximum(np.abs(columns).max(axis=1, keepdims=True), 1e-30)
    rounded = np.vstack([np.round(columns / scale, 9), codes[None]])
    _, first, repeats = np.unique(rounded, axis=1, return_index=True, return_counts=True)
    merged = columns[:, first]
    return OperationGroup(
        part=part,
        phase=phase,
        names=tuple(names[first].tolist()),
        width=np.where(merged[-1] > 0, merged[-1], np.inf),
        tokens=merged[2 * sums : 3 * sums],
        flops=merged[:sums],
        moved=merged[sums : 2 * sums],
        pairs=merged[-2],
        repeats=repeats.astype(float),
    )


def _solve(sums: Sequence[str], sizes: Sequence[PackSizes], values: Floats) -> Floats:
    """Coefficients [sums, n] of `values` [runs, n]; sums that always go together share theirs."""
    known = np.asarray([[s.get(name) for name in sums] for s in sizes])
    scale = np.maximum(known.max(axis=0), 1.0)
    found: Floats = np.linalg.lstsq(known / scale, values, rcond=1e-10)[0] / scale[:, None]
    return found
