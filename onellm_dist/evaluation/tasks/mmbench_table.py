"""MMBench's answer file: a table for its server."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from onellm_dist.evaluation.questions import GivenAnswer

_HEAD = ("index", "question", "A", "B", "C", "D", "prediction")


def write_table(answers: Sequence[GivenAnswer]) -> Mapping[str, bytes]:
    """The rows with their predictions: `.xlsx`, as the server takes it; `.csv` without openpyxl."""
    rows: list[list[object]] = []
    for answer in answers:
        question = answer.question
        options = [*question.options, *[""] * 4][:4]
        rows.append([int(question.extra["index"]), question.text, *options, answer.text])
    if find_spec("openpyxl") is None:
        out = io.StringIO()
        csv.writer(out).writerows([_HEAD, *rows])
        return {"mmbench.csv": out.getvalue().encode("utf-8", "replace")}
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(_HEAD)
    for row in rows:
        cells = [WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", str(c))) for c in row[1:]]
        for cell in cells:
            cell.data_type = "s"  # "=1+1" is an answer, not a formula
        sheet.append([row[0], *cells])
    content = io.BytesIO()
    book.save(content)
    return {"mmbench.xlsx": content.getvalue()}


def check_table(name: str, content: bytes) -> Sequence[str]:
    """Check the columns, that texts are texts, and that no index is repeated."""
    if name.endswith(".csv"):
        rows: list[Sequence[object]] = list(csv.reader(io.StringIO(content.decode("utf-8"))))
    else:
        from openpyxl import load_workbook

        sheet: Any = load_workbook(io.BytesIO(content), read_only=True).worksheets[0]
        cells = [tuple(row) for row in sheet.iter_rows()]
        rows = [tuple(cell.value for cell in row) for row in cells]
        if odd := [c for row in cells for c in row if c.data_type in ("f", "e")]:
            return [f"{cell.coordinate} is a formula: {cell.value}" for cell in odd]
    if not rows or tuple(rows[0]) != _HEAD:
        return [f"the columns are {tuple(rows[0]) if rows else ()}, not {_HEAD}"]
    indices = [str(row[0]) for row in rows[1:]]
    repeated = sorted({i for i in indices if indices.count(i) > 1}) if _has_twice(indices) else []
    return [f"index {i} is repeated" for i in repeated]


def _has_twice(values: Sequence[str]) -> bool:
    return len(set(values)) < len(values)
