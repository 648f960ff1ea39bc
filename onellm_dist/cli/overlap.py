"""`onellm shards overlap`: benchmarks in training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def overlap(
    datasets: Annotated[
        list[str], typer.Argument(help="Training datasets and benchmarks (NAME-eval), any order.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("overlap"),
) -> None:
    """Find which questions of benchmarks have media or texts that training shards contain.

    Example: onellm shards overlap shards/laion shards/gqa-eval --out overlap
             onellm score evaluation --without overlap/media.txt
    """
    from onellm_dist.shards.tools.overlap import find_overlap, format_overlap, write_overlap

    report = find_overlap(datasets)
    write_overlap(out, report)
    typer.echo(format_overlap(out, report))
