"""Lines of the sample log about samples that were left out, whichever file has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onellm_dist.train.records.json_lines import read_lines


def read_left_out(path: Path) -> list[dict[str, Any]]:
    """The entries of a file: `step`, `sample_id`, `reason` and what else it has, in order.

    Lines that a kill cut short or that are damaged are passed over; [] without a file.
    """
    return [
        entry
        for entry in read_lines(path)
        if isinstance(entry.get("sample_id"), str)
        and isinstance(entry.get("reason"), str)
        and type(entry.get("step")) is int
    ]
