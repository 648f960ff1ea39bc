"""The page and the files of an ablation's tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from onellm_dist.common.files import write_atomic
from onellm_dist.common.html.page import build_html_page, build_html_table, write_page
from onellm_dist.testing.ablations.sizes import AblationSize
from onellm_dist.testing.ablations.tables import (
    Table,
    format_tables,
    list_cells,
    list_headings,
)
from onellm_dist.testing.ablations.variants import COMPARED

PAGE, MARKDOWN, NUMBERS = "report.html", "tables.md", "tables.json"
EXPLAINED = (
    "Percent of the captions of held-out combinations in which every word is right: the mean over "
    "seeds with Student's 95% interval (of one seed: Wilson's over its samples); behind the "
    "semicolon the difference to the default, of the seeds that both have. A difference is clear "
    "if its interval leaves out 0. Towers, datasets and test samples are the same in all runs; a "
    "seed decides the weights between the towers and the order of the samples. The paper gives no "
    "intervals."
)


def write_tables(out: Path, tables: Sequence[Table], size: AblationSize, device: str) -> Path:
    """Write the page, the tables in Markdown and their numbers; returns the page.

    Args:
        out: the folder of the ablation.
        tables: its tables.
        size: its size.
        device: what the last start ran on.
    """
    note = f"**{size.note}**\n\n" if size.note else ""
    write_atomic(out / MARKDOWN, f"{note}{EXPLAINED}\n\n{format_tables(tables)}\n")
    write_atomic(out / NUMBERS, json.dumps([asdict(table) for table in tables], indent=1) + "\n")
    body = list(_build_body(tables, size, device))
    write_page(out / PAGE, build_html_page("Ablations on the toy world", body))
    return out / PAGE


def _build_body(tables: Sequence[Table], size: AblationSize, device: str) -> Iterator[str]:
    yield "<h1>Ablations on the toy world</h1>"
    yield f'<p class="dim">Size {escape(size.name)}, on {escape(device)}.</p><p>{EXPLAINED}</p>'
    pairs = ", ".join(f"{modality} with {column}" for modality, column in COMPARED.items())
    yield f"<p>Compared with the paper: {escape(pairs)}.</p>"
    if size.note:
        yield f"<p><b>{escape(size.note)}</b></p>"
    for table in tables:
        yield f"<h2>{escape(table.part.title)}: {escape(table.part.table)} of the paper</h2>"
        head = ["", *list_headings()]
        yield build_html_table(head, map(list_cells, table.rows), right=range(1, len(head)))
