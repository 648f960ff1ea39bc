"""The `onellm` command. It only wires: each command imports its room when it is called, so that `--help` is instant."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from onellm_dist.errors import EXIT_DONE, OneLLMError

app = typer.Typer(
    name="onellm",
    help="A distributed trainer for multimodal LLMs: eight modalities, tar shards, exact resumes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
shards_app = typer.Typer(no_args_is_help=True, help="Build, index and check tar shards.")
convert_app = typer.Typer(no_args_is_help=True, help="Convert checkpoints.")
app.add_typer(shards_app, name="shards")
app.add_typer(convert_app, name="convert")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for shards, runs, table and report.")] = Path("demo_run"),
    full: Annotated[bool, typer.Option("--full", help="Train to convergence: no time limit.")] = False,
) -> None:
    """Run the whole path on the toy world: shards, towers, align, tune, captions, report.

    Example: onellm demo --out demo_run
    """
    from onellm_dist.demo.run import run_demo

    raise typer.Exit(run_demo(out, full=full))


@app.command()
def doctor() -> None:
    """Say what this machine has and what would go wrong: versions, attention kernels, GPUs, launchers.

    Example: onellm doctor
    """
    from onellm_dist.doctor import run_doctor

    raise typer.Exit(run_doctor())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": False})
def train(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, or the name of one that ships (toy/align_image).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, values in YAML: train.steps=10.", metavar="[KEY=VALUE]...")
    ] = None,
) -> None:
    """Train a recipe: under deepspeed, torchrun or srun, or alone (then `launch.ranks` local ranks are started).

    Example: onellm train toy/align_image data.root=toy launch.ranks=2 run.dir=runs/first
    """
    from onellm_dist.train.run import main as train_main

    raise typer.Exit(train_main(recipe, overrides or []))


@shards_app.command("build")
def shards_build(
    source: Annotated[str, typer.Argument(help="toyworld, folder (media with captions), or a dataset recipe (YAML).")],
    paths: Annotated[list[Path] | None, typer.Argument(help="OUT for toyworld, IN OUT for folder.", metavar="[IN] OUT")] = None,
    option: Annotated[list[str] | None, typer.Option("--option", "-o", help="key=value of the source; --option help lists them.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; never changes the bytes written.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of sources that draw.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a dataset that stands at OUT.")] = False,
) -> None:
    """Build shards and their index.

    Examples: onellm shards build toyworld toy
              onellm shards build folder photos/ photo_shards --option modality=image
    """
    from onellm_dist.shards.build import build_command

    raise typer.Exit(build_command(source, paths or [], option or [], workers=workers, seed=seed, overwrite=overwrite))


@shards_app.command("index")
def shards_index(
    paths: Annotated[list[Path], typer.Argument(help="Tars, or folders of tars.")],
    modality: Annotated[list[str] | None, typer.Option(help="What each sample has; repeat for joint samples.")] = None,
) -> None:
    """Index WebDataset tars of others without rewriting them.

    Example: onellm shards index laion/00000.tar --modality image
    """
    from onellm_dist.shards.build import index_command

    raise typer.Exit(index_command(paths, modality or []))


@shards_app.command("verify")
def shards_verify(dataset: Annotated[Path, typer.Argument(help="A dataset folder.")]) -> None:
    """Read every byte of a dataset and name each fault: shard, key, offset.

    Example: onellm shards verify toy/image
    """
    from onellm_dist.shards.verify import verify_command

    raise typer.Exit(verify_command(dataset))


@convert_app.command("reference")
def convert_reference(
    checkpoint: Annotated[Path, typer.Argument(help="OneLLM's consolidated.00-of-01.pth, or safetensors of the same keys.")],
    out: Annotated[Path, typer.Argument(help="The onellm directory to write.")],
    tokenizer: Annotated[Path | None, typer.Option(help="The LLM's tokenizer: a file or a transformers directory.")] = None,
    encoder_heads: Annotated[int | None, typer.Option(help="Default: width / 64.")] = None,
    upm_heads: Annotated[int | None, typer.Option(help="Default: width / 64.")] = None,
    llm_heads: Annotated[int | None, typer.Option(help="Default: width / 128.")] = None,
) -> None:
    """Take OneLLM's own checkpoint layout in.

    Example: onellm convert reference consolidated.00-of-01.pth onellm-7b --tokenizer llama/tokenizer.model
    """
    from onellm_dist.convert.reference import convert_reference as run

    done = run(checkpoint, out, tokenizer=tokenizer, encoder_heads=encoder_heads, upm_heads=upm_heads, llm_heads=llm_heads)
    print(f"{out}: {done.parameters:,} parameters; {len(done.ignored)} keys of CLIP's unused text tower left out")
    if not done.tokenizer:
        print(f"{out} has no tokenizer: give --tokenizer to make it a whole onellm directory (onellm generate needs one)")


def _generate(
    model: Annotated[Path, typer.Argument(help="A onellm directory.")],
    prompt: Annotated[str, typer.Argument(help="What to ask; empty: caption the input.")] = "",
    order: Annotated[str, typer.Option(help="Order of the inputs in the sequence, by comma: video,audio.")] = "",
    prompt_format: Annotated[str, typer.Option("--format", help="auto, conversation or raw.")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Nucleus, where temperature > 0.")] = 0.75,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 1,
    decode_offset: Annotated[str, typer.Option(help="correct, or reference (its cache is two positions short).")] = "correct",
    **files: Any,
) -> None:
    """Ask a model about files of any modality, several at once.

    Example: onellm generate runs/tune/model --image cat.jpg "What is this?"
    """
    from onellm_dist.generate import generate_command

    given = [(name, path) for name, paths in files.items() for path in paths or ()]
    raise typer.Exit(
        generate_command(
            model, prompt, given, order=order, prompt_format=prompt_format, max_new_tokens=max_new_tokens,
            temperature=temperature, top_p=top_p, seed=seed, decode_offset=decode_offset,
        )
    )  # fmt: skip


def _with_modality_options(function: Any) -> Any:
    """One repeatable `--NAME FILE` option for each modality there is, in place of `**files`."""
    from onellm_dist.modalities import all_modalities

    signature = inspect.signature(function, eval_str=True)
    fixed = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[list[Path] | None, typer.Option(f"--{name}", help=f"A file of modality {name} (repeatable).")],
        )
        for name in all_modalities()
    ]
    function.__signature__ = signature.replace(parameters=[*fixed, *options])
    function.__annotations__ = {p.name: p.annotation for p in [*fixed, *options]}
    return function


def main(argv: list[str] | None = None) -> NoReturn:
    """Entry point of `onellm`: every error that a user can mend is three lines and the right exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    wanted = arguments[:1] == ["generate"] or not arguments or arguments[0].startswith("-")
    if wanted and all(command.name != "generate" for command in app.registered_commands):
        app.command("generate")(_with_modality_options(_generate))
    try:
        app(arguments, prog_name="onellm")
    except OneLLMError as error:
        print(f"onellm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(EXIT_DONE)


if __name__ == "__main__":
    main()
