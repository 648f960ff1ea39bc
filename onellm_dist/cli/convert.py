"""`onellm convert ...`: one command per format, and commands about checkpoints of any format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from onellm_dist.cli.help import format_examples
from onellm_dist.convert.registry import FormatInfo, list_formats, list_writable

app = typer.Typer(
    no_args_is_help=True,
    help="Convert checkpoints (onellm convert FORMAT SRC DST), assemble, compare and inspect them.",
)

Tokenizer = Annotated[Path | None, typer.Option(help="The LLM's tokenizer: a file or a folder.")]
Activation = Annotated[
    str | None,
    typer.Option(help="Activation of a CLIP whose file does not state it: quick_gelu or gelu."),
]
EncoderHeads = Annotated[
    int | None, typer.Option(help="Heads of the encoder.", show_default="as stated, or width / 64")
]
UPMHeads = Annotated[
    int | None, typer.Option(help="Heads of the UPM.", show_default="as stated, or width / 64")
]
LLMHeads = Annotated[
    int | None,
    typer.Option(help="Heads of the LLM.", show_default="params.json, or width / 128"),
]
Base = Annotated[
    Path | None,
    typer.Option(help="For training checkpoints: the onellm directory that the run started from."),
]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        help="A key, or a pattern with *, that may be missing, unknown or not finite (repeatable)."
    ),
]
ShardGigabytes = Annotated[
    float, typer.Option(min=0.001, help="Size of the largest safetensors file, in GB.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what an earlier conversion wrote there.")
]
LLMPart = Annotated[Path | None, typer.Option(help="A checkpoint of any format with an LLM.")]
EncoderPart = Annotated[
    str | None,
    typer.Option(help="A CLIP of any format, or a tower by name: timm:NAME, open-clip:NAME."),
]
ExtendedModel = Annotated[
    Path | None, typer.Option(help="A onellm model to extend, in place of --llm and --encoder.")
]
Experts = Annotated[int, typer.Option(min=1, help="Experts of a new model.")]
Blocks = Annotated[int, typer.Option(min=1, help="Blocks of each expert of a new model.")]
RouterKind = Annotated[str, typer.Option(help="Router of a new model: soft, constant or sparse.")]
ExpertStart = Annotated[
    str,
    typer.Option(help="Experts of a new model: separate, or copied (all start as the first)."),
]
NewModalities = Annotated[
    list[str] | None,
    typer.Option(help="A modality of a new model (repeatable).", show_default="all"),
]
AddedExperts = Annotated[
    int, typer.Option(min=0, help="Experts to add to --base, closed for its modalities at first.")
]
AddedModalities = Annotated[
    list[str] | None, typer.Option(help="A modality to add to --base (repeatable).")
]
AddedExpertStart = Annotated[
    str, typer.Option(help="Added experts: copied (from the first) or separate (random).")
]
ExpertNoise = Annotated[
    float | None,
    typer.Option(
        min=0, help="Relative noise that makes copied experts differ.", show_default="0.01"
    ),
]
RouterBias = Annotated[
    float,
    typer.Option(
        help="Router bias of added experts in old modalities; its sigmoid is their weight."
    ),
]
PartsDtype = Annotated[
    str | None,
    typer.Option(
        help="fp32, bf16 or fp16.", show_default="parts keep their own, new ones are fp32"
    ),
]


def _add_command(info: FormatInfo) -> None:
    """Add the command `onellm convert NAME`; all formats take the same options."""

    def command(
        source: Annotated[
            Path, typer.Argument(help="The checkpoint: a file or a folder.", metavar="SRC")
        ],
        out: Annotated[Path, typer.Argument(help="The folder to write.", metavar="DST")],
        to: str | None = None,
        tokenizer: Tokenizer = None,
        dtype: Annotated[
            str | None,
            typer.Option(help="fp32, bf16 or fp16.", show_default="each tensor keeps its own"),
        ] = None,
        base: Base = None,
        act: Activation = None,
        encoder_heads: EncoderHeads = None,
        upm_heads: UPMHeads = None,
        llm_heads: LLMHeads = None,
        allow: Allow = None,
        shard_gb: ShardGigabytes = 5.0,
        workers: Annotated[
            int | None,
            typer.Option(min=1, help="Files written at once.", show_default="2, or fewer cores"),
        ] = None,
        overwrite: Overwrite = False,
    ) -> None:
        from onellm_dist.cli.convert_commands import run_convert

        given = {
            "tokenizer": tokenizer,
            "dtype": dtype,
            "base": base,
            "act": act,
            "encoder_heads": encoder_heads,
            "upm_heads": upm_heads,
            "llm_heads": llm_heads,
            "allow": allow,
            "shard_gb": shard_gb,
        }
        raise typer.Exit(
            run_convert(info.name, source, out, to, given, workers=workers, overwrite=overwrite)
        )

    # Set here, because typer cannot see local names in an annotation.
    help_to = f"Format to write: one of {', '.join(list_writable())}."
    option_to = typer.Option(help=help_to, show_default=info.default_target)
    command.__annotations__["to"] = Annotated[str | None, option_to]
    example = f"onellm convert {info.name} {info.example} out --to {info.default_target}"
    app.command(
        info.name,
        help=f"{info.about} It is written as {info.default_target} unless --to names another "
        "format.",
        short_help=info.about,
        epilog=format_examples(example),
    )(command)


for _info in list_formats().values():
    _add_command(_info)


@app.command(
    "assemble",
    epilog=format_examples(
        "onellm convert assemble --llm llama-2-7b --encoder clip-vit-large-patch14 "
        "models/onellm-7b-start",
        "onellm convert assemble --base models/stage1 --add-modality audio models/stage2-start",
    ),
)
def convert_assemble(
    out: Annotated[Path, typer.Argument(help="The onellm directory to write.")],
    llm: LLMPart = None,
    encoder: EncoderPart = None,
    base: ExtendedModel = None,
    experts: Experts = 3,
    blocks: Blocks = 8,
    router: RouterKind = "soft",
    init: ExpertStart = "separate",
    upm_heads: UPMHeads = None,
    modality: NewModalities = None,
    add_experts: AddedExperts = 0,
    add_modality: AddedModalities = None,
    expert_init: AddedExpertStart = "copied",
    expert_noise: ExpertNoise = None,
    router_bias: RouterBias = -20.0,
    seed: Annotated[int, typer.Option(help="Seed of random parts.")] = 0,
    tokenizer: Tokenizer = None,
    dtype: PartsDtype = None,
    act: Activation = None,
    encoder_heads: EncoderHeads = None,
    llm_heads: LLMHeads = None,
    allow: Allow = None,
    shard_gb: ShardGigabytes = 5.0,
    overwrite: Overwrite = False,
) -> None:
    """Put an LLM and an encoder together, ready for stage I; or extend a trained model.

    A trained model gets more experts, more modalities, or both.
    """
    given = locals()
    from onellm_dist.cli.convert_commands import run_assemble

    raise typer.Exit(run_assemble(**given))


@app.command(
    "verify", epilog=format_examples("onellm convert verify consolidated.00-of-01.pth onellm-7b")
)
def convert_verify(
    a: Annotated[Path, typer.Argument(help="A checkpoint of any format.")],
    b: Annotated[Path, typer.Argument(help="Another checkpoint, of any format.")],
    logits: Annotated[
        bool,
        typer.Option(
            "--logits",
            help="Also compare a forward on random inputs (both models in memory, fp32).",
        ),
    ] = False,
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="Also compare a forward on the inputs in this safetensors file: input_ids, "
            "image_values and so on."
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest absolute difference that counts as the same.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
    from_a: Annotated[
        str | None, typer.Option(help="Format of A.", show_default="as recognised")
    ] = None,
    from_b: Annotated[
        str | None, typer.Option(help="Format of B.", show_default="as recognised")
    ] = None,
    encoder_heads: EncoderHeads = None,
    upm_heads: UPMHeads = None,
    llm_heads: LLMHeads = None,
    act: Activation = None,
    base: Base = None,
) -> None:
    """Compare two checkpoints of any two formats, tensor by tensor after mapping.

    Exit code: 0 if they are the same, 1 if not.
    """
    from onellm_dist.cli.convert_commands import build_options, run_verify

    heads = {"encoder_heads": encoder_heads, "upm_heads": upm_heads, "llm_heads": llm_heads}
    options = build_options({**heads, "act": act, "base": base})
    raise typer.Exit(
        run_verify(
            a,
            b,
            options,
            logits=logits,
            inputs=inputs,
            tolerance=tolerance,
            seed=seed,
            from_a=from_a,
            from_b=from_b,
        )
    )


@app.command("inspect", epilog=format_examples("onellm convert inspect runs/stage1_image"))
def convert_inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint of any format.")],
    format_name: Annotated[
        str | None, typer.Option("--from", help="Its format.", show_default="as recognised")
    ] = None,
    base: Base = None,
    act: Activation = None,
    llm_heads: LLMHeads = None,
) -> None:
    """Show what a checkpoint is: format, parameters by part, dtypes, training state, missing keys.

    Exit code: 0 if all keys fit, 1 if not.
    """
    from onellm_dist.cli.convert_commands import build_options, run_inspect

    options = build_options({"base": base, "act": act, "llm_heads": llm_heads})
    raise typer.Exit(run_inspect(path, options, format_name))


@app.command(
    "publish", epilog=format_examples("onellm convert publish runs/tune/model --repo me/my-model")
)
def convert_publish(
    folder: Annotated[Path, typer.Argument(help="A onellm directory.")],
    repository: Annotated[
        str, typer.Option("--repo", help="Repository on the Hub: OWNER/NAME.")
    ] = "OWNER/NAME",
    load: Annotated[
        bool, typer.Option(help="Also load it in a process without onellm_dist (all its weights).")
    ] = True,
) -> None:
    """Check a model before it is published, and print the command that uploads it.

    Nothing is uploaded. Exit code: 0 if it may be published, 1 if not.
    """
    from onellm_dist.cli.convert_commands import run_publish

    raise typer.Exit(run_publish(folder, repository, load=load))
