"""Tables of plain text: every row is one line, so that `grep` and `cut` can read them too."""

from __future__ import annotations

from collections.abc import Collection, Sequence

GAP = "  "


def format_table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> list[str]:
    """Align the cells of rows in columns; the last column is as wide as it is.

    Args:
        rows: the cells; every row has the same number.
        right: columns whose cells are aligned to the right, such as numbers.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        GAP.join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
