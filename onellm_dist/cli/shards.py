"""The commands `onellm shards ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

app = typer.Typer(no_args_is_help=True, help="Build, index and check tar shards.")


class _BuildCommand(TyperCommand):
    """`onellm shards build`, which also takes the source's flags; `SOURCE --help` lists them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line, with the flags of the source as `--option`s."""
        if all(a.startswith("-") for a in args):  # no source is named: nothing to import
            return super().parse_args(ctx, args)
        from onellm_dist.shards.build.arguments import (
            expand_source_flags,
            find_source,
            format_source_help,
        )

        source = find_source(args)
        if source is not None and "--help" in args:
            print(format_source_help(source))
            ctx.exit()
        own = [flag for parameter in self.get_params(ctx) for flag in parameter.opts]
        return super().parse_args(ctx, expand_source_flags(args, own))


WorkersOption = Annotated[
    int, typer.Option(min=1, help="Processes; the bytes written do not depend on it.")
]
OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace a dataset at OUT, or an unfinished build of another."
    ),
]
LinksOption = Annotated[
    bool,
    typer.Option("--follow-links", help="Also read tars that are links out of the folder."),
]
RestartOption = Annotated[
    bool,
    typer.Option("--restart", help="First discard an unfinished build of OUT (one process alone)."),
]


@app.command("build", cls=_BuildCommand)
def shards_build(
    source: Annotated[
        str,
        typer.Argument(
            help="A source (toyworld, folder, webvid, ...), or the path of a recipe (YAML)."
        ),
    ],
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="IN OUT, or OUT alone if the source makes its data.", metavar="[IN] OUT"
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            help="key=value of the source; --key value also works. SOURCE --help lists them.",
        ),
    ] = None,
    workers: WorkersOption = 1,
    seed: Annotated[int, typer.Option(help="Seed of sources that draw or shuffle.")] = 0,
    overwrite: OverwriteOption = False,
    restart: RestartOption = False,
    task: Annotated[
        str, typer.Option(help="INDEX/COUNT: this process's share of the shards (Slurm arrays).")
    ] = "0/1",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Describe what would be built; write nothing.")
    ] = False,
) -> None:
    """Build shards and their indexes. The same call resumes a stopped build; equal calls share it.

    Examples: onellm shards build toyworld toy
              onellm shards build folder photos/ photo_shards --option modality=image
              onellm shards build cc3m-depth cc3m/ cc3m_depth_shards --depth-model models/dpt-large
              srun -n 64 onellm shards build laion400m laion/ laion_shards --workers 8
    """
    from onellm_dist.shards.command import build_command

    raise typer.Exit(
        build_command(
            source,
            paths or [],
            option or [],
            workers=workers,
            seed=seed,
            overwrite=overwrite,
            restart=restart,
            task=task,
            dry_run=dry_run,
        )
    )


@app.command("index")
def shards_index(
    paths: Annotated[list[Path], typer.Argument(help="Tars, or folders of tars.")],
    modality: Annotated[
        list[str] | None,
        typer.Option(help="What each sample has; repeat it for samples of several."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes, each with a tar at a time.")] = 1,
    again: Annotated[
        bool,
        typer.Option("--again", help="Also index tars whose index fits (name, size, not older)."),
    ] = False,
    follow_links: LinksOption = False,
    media: Annotated[
        bool,
        typer.Option(
            "--media",
            help="Also read the headers of the media (data.spans needs it). Samples may differ in "
            "media then: 0.jpg, 1.jpg, with <image> in their texts.",
        ),
    ] = False,
) -> None:
    """Index existing WebDataset tars without rewriting them.

    Examples: onellm shards index laion/ --modality image --workers 8
              onellm shards index interleaved/ --media
    """
    from onellm_dist.shards.command import index_command

    raise typer.Exit(
        index_command(
            paths,
            modality or [],
            workers=workers,
            again=again,
            follow_links=follow_links,
            media=media,
        )
    )


@app.command("count")
def shards_count(
    recipe: Annotated[str, typer.Argument(help="A recipe, or the name of one that ships.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Keys of the recipe to change.", metavar="KEY=VALUE")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes.", show_default="one per CPU of the job")
    ] = None,
    task: Annotated[
        str, typer.Option(help="INDEX/COUNT: this process's share of the shards (Slurm arrays).")
    ] = "0/1",
) -> None:
    """Count tokens and spans of a recipe's samples beforehand, so that its start counts nothing.

    Example: onellm shards count stage1_image data.root=/data --task $SLURM_ARRAY_TASK_ID/16
    """
    from onellm_dist.train.count_command import count_recipe

    raise typer.Exit(count_recipe(recipe, overrides or [], workers=workers, task=task))


@app.command("verify")
def shards_verify(
    dataset: Annotated[str, typer.Argument(help="A dataset folder, or its URL.")],
    workers: Annotated[
        int, typer.Option(min=1, help="Processes, each with a shard at a time.")
    ] = 1,
    follow_links: LinksOption = False,
) -> None:
    """Read every byte of a dataset, and name each fault with shard, key and offset.

    Remote shards are copied to TMPDIR, one a process at a time.

    Examples: onellm shards verify toy/image --workers 8
              onellm shards verify s3://bucket/laion --workers 8
    """
    from onellm_dist.shards.tools.verify import verify_command

    raise typer.Exit(verify_command(dataset, workers=workers, follow_links=follow_links))


@app.command("repair")
def shards_repair(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that look for faults, each in a shard at a time.")
    ] = 1,
) -> None:
    """Repair what verify finds: make indexes again, leave out bad samples. Old tars are kept.

    Example: onellm shards repair toy/image
    """
    from onellm_dist.shards.tools.repair import repair_command

    raise typer.Exit(repair_command(dataset, workers=workers))


@app.command("stats")
def shards_stats(
    dataset: Annotated[str, typer.Argument(help="A dataset folder, or its URL.")],
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("stats.html"),
    seed: Annotated[int, typer.Option(help="Seed of the random examples.")] = 0,
    follow_links: LinksOption = False,
) -> None:
    """Write one HTML page: counts, lengths, durations, captions, and what was left out, and why.

    Example: onellm shards stats toy/audio --out audio.html
    """
    from onellm_dist.shards.tools.preview import preview_command

    raise typer.Exit(
        preview_command(dataset, out, previews=0, seed=seed, follow_links=follow_links)
    )


@app.command("preview")
def shards_preview(
    dataset: Annotated[str, typer.Argument(help="A dataset folder, or its URL.")],
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("preview.html"),
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Samples to draw.")] = 24,
    seed: Annotated[int, typer.Option(help="Seed of the random samples.")] = 0,
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key",
            "-k",
            help="Show this sample instead: its key, or its id as a run names it. Repeatable.",
        ),
    ] = None,
    follow_links: LinksOption = False,
) -> None:
    """Write the page of stats, with pictures of random samples, or of the samples with given keys.

    Examples: onellm shards preview toy/depth -n 40
              onellm shards preview toy/depth --key depth/train-000000/train_0000007@0
    """
    from onellm_dist.shards.tools.preview import preview_command

    raise typer.Exit(
        preview_command(
            dataset, out, previews=samples, seed=seed, keys=key or [], follow_links=follow_links
        )
    )


@app.command("energon")
def shards_energon(dataset: Annotated[Path, typer.Argument(help="A dataset folder.")]) -> None:
    """Write Megatron-Energon's metadata into a dataset (builds from an input do so themselves).

    Example: onellm shards energon toy/image
    """
    from onellm_dist.shards.format.energon import write_energon

    write_energon(dataset)
    print(f"{dataset}: .nv-meta/ and .tar.idx written")
