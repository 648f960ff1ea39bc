"""`onellm ablate`: the paper's ablations on the toy world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onellm_dist.cli.help import format_examples

app = typer.Typer()


@app.command(
    epilog=format_examples(
        "onellm ablate --out ablations_run", "onellm ablate --only default --only random-init"
    )
)
def ablate(
    out: Annotated[
        Path, typer.Option(help="Folder of the queue, the table and the page; it is resumed.")
    ] = Path("ablations_run"),
    seeds: Annotated[
        int, typer.Option(min=1, help="Seeds of each variant; intervals need two, better three.")
    ] = 3,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="A variant: default, separate, random-init, experts-1, experts-5, experts-7, "
            "router-constant, router-sparse, encoder-trained, encoder-dino (repeatable).",
            show_default="all",
        ),
    ] = None,
    size: Annotated[
        str,
        typer.Option(
            help="full (hours); short (few steps of all modalities); quick (images alone, two or "
            "three CPU minutes a run); or tiny, which learns nothing: it tries the queue."
        ),
    ] = "full",
) -> None:
    """Train the paper's ablations (Tables 7 and 8) on the toy world, and compare with its scores.

    Every variant is aligned with images, then with images, videos and audio together, and captions
    held-out samples. Interrupted, the same command resumes; more seeds or variants add to what is
    there.
    """
    from onellm_dist.testing.ablations.run import run_ablations

    raise typer.Exit(run_ablations(out, size, seeds, only or ()))
