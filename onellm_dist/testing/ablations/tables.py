"""The tables of the ablations: means over seeds with intervals, beside the paper's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from onellm_dist.evaluation.scorers.captions import Interval, wilson_interval
from onellm_dist.testing.ablations.results import EntryResult
from onellm_dist.testing.ablations.variants import (
    COMPARED,
    DEFAULT,
    MODALITIES,
    PAPER_COLUMNS,
    TABLE_PARTS,
    VARIANTS,
    TablePart,
)

SPLIT = "test_held_out"
"""The combinations that no model was trained on."""
Agreement = Literal["as in the paper", "against the paper", "not clear", ""]


@dataclass(frozen=True)
class Cell:
    """One modality of one variant, in percent of captions that are right."""

    score: Interval
    difference: Interval | None
    """To the default, of the seeds that both have; None with fewer than two such seeds."""
    paper_difference: float
    """The paper's, on the benchmark that COMPARED names."""

    @property
    def agreement(self) -> Agreement:
        """Whether the difference is clear, and points where the paper's does."""
        if self.difference is None or self.paper_difference == 0:
            return ""
        if self.difference.low <= 0 <= self.difference.high:
            return "not clear"
        same = (self.difference.mean > 0) == (self.paper_difference > 0)
        return "as in the paper" if same else "against the paper"


@dataclass(frozen=True)
class Row:
    """One variant in a table."""

    title: str
    seeds: int
    cells: Mapping[str, Cell]
    """Modality -> what was measured; those that all results of the row have."""
    paper: tuple[float, ...]


@dataclass(frozen=True)
class Table:
    """One part of the paper's tables."""

    part: TablePart
    rows: Sequence[Row]


def build_tables(results: Sequence[EntryResult]) -> list[Table]:
    """Build every part of which a variant besides the default has a result."""
    by_variant: dict[str, dict[int, EntryResult]] = {}
    for result in results:
        by_variant.setdefault(result.variant, {})[result.seed] = result
    tables = []
    for part in TABLE_PARTS:
        rows = [
            _build_row(name, title, by_variant)
            for name, title in part.rows.items()
            if name in by_variant
        ]
        if any(name in by_variant for name in part.rows if name != DEFAULT):
            tables.append(Table(part, rows))
    return tables


def _build_row(name: str, title: str, by_variant: Mapping[str, Mapping[int, EntryResult]]) -> Row:
    own, default = by_variant[name], by_variant.get(DEFAULT, {})
    measured = set.intersection(*(set(result.scores) for result in own.values()))
    paper = VARIANTS[name].paper
    cells = {}
    for modality in filter(measured.__contains__, MODALITIES):
        column = PAPER_COLUMNS.index(COMPARED[modality])
        shared = sorted(own.keys() & default.keys()) if name != DEFAULT else []
        pairs = [_get_share(own[s], modality) - _get_share(default[s], modality) for s in shared]
        cells[modality] = Cell(
            _compute_score([result for _, result in sorted(own.items())], modality),
            compute_mean_interval(pairs) if len(pairs) > 1 else None,
            paper[column] - VARIANTS[DEFAULT].paper[column],
        )
    return Row(title, len(own), cells, paper)


def _get_share(result: EntryResult, modality: str) -> float:
    score = result.scores[modality][SPLIT]
    return 100 * score.right / score.n


def _compute_score(results: Sequence[EntryResult], modality: str) -> Interval:
    """The mean over seeds; of one seed, Wilson's interval over its samples."""
    if len(results) > 1:
        return compute_mean_interval([_get_share(result, modality) for result in results])
    score = results[0].scores[modality][SPLIT]
    share = wilson_interval(score.right, score.n)
    return Interval(100 * share.mean, 100 * share.low, 100 * share.high)


def compute_mean_interval(values: Sequence[float]) -> Interval:
    """The mean of at least two values with Student's 95% interval."""
    array = np.asarray(values, dtype=np.float64)
    mean, n = float(array.mean()), len(array)
    half = float(stats.t.ppf(0.975, n - 1) * array.std(ddof=1) / np.sqrt(n))
    return Interval(mean, mean - half, mean + half)


def list_headings() -> list[str]:
    """Headings of a table without its first column."""
    return ["seeds", *MODALITIES, *(f"{name} (paper)" for name in PAPER_COLUMNS)]


def format_cell(cell: Cell) -> str:
    """`81.2 [78.0, 84.4], -3.1 [-5.0, -1.2]: as in the paper`."""
    text = format_interval(cell.score)
    if cell.difference is not None:
        text += f"; {format_interval(cell.difference, '+')}"
    return f"{text}: {cell.agreement}" if cell.agreement else text


def format_interval(interval: Interval, sign: str = "") -> str:
    """`81.2 [78.0, 84.4]`."""
    return f"{interval.mean:{sign}.1f} [{interval.low:{sign}.1f}, {interval.high:{sign}.1f}]"


def list_cells(row: Row) -> list[str]:
    """The cells of a row, as text."""
    cells = [
        format_cell(row.cells[modality]) if modality in row.cells else "not trained"
        for modality in MODALITIES
    ]
    return [row.title, str(row.seeds), *cells, *(f"{value:.1f}" for value in row.paper)]


def format_tables(tables: Sequence[Table]) -> str:
    """The tables in Markdown."""
    lines: list[str] = []
    for table in tables:
        head = [f"{table.part.title} ({table.part.table})", *list_headings()]
        rows = [head, ["---"] * len(head), *map(list_cells, table.rows)]
        lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
    return "\n".join(lines) or "no result yet"
