"""`onellm convert ...`: a command a format, and those about checkpoints of any."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from onellm_dist.convert.registry import ABOUT, DEFAULT_TARGET, EXAMPLES

app = typer.Typer(
    no_args_is_help=True,
    help="Convert checkpoints: `onellm convert FROM SRC DST [--to TO]`; assemble, compare and inspect them.",
)


def _converter(name: str) -> Any:
    """The command `onellm convert <name>`: all formats take the same options."""

    def command(
        source: Annotated[
            Path, typer.Argument(help="The checkpoint: a file or a folder.", metavar="SRC")
        ],
        out: Annotated[Path, typer.Argument(help="The folder to write.", metavar="DST")],
        to: Annotated[
            str | None,
            typer.Option(
                help="onellm, reference, meta-llama, hf, open-clip or hf-clip; default: see above."
            ),
        ] = None,
        tokenizer: Annotated[
            Path | None, typer.Option(help="The LLM's tokenizer: a file or a folder.")
        ] = None,
        dtype: Annotated[
            str | None, typer.Option(help="fp32, bf16 or fp16; default: each tensor keeps its own.")
        ] = None,
        base: Annotated[
            Path | None, typer.Option(help="For runs: the onellm directory that it started from.")
        ] = None,
        act: Annotated[
            str | None, typer.Option(help="For CLIP files that do not say it: quick_gelu or gelu.")
        ] = None,
        encoder_heads: Annotated[int | None, typer.Option(help="Default: width / 64.")] = None,
        upm_heads: Annotated[int | None, typer.Option(help="Default: width / 64.")] = None,
        llm_heads: Annotated[
            int | None, typer.Option(help="Default: params.json, or width / 128.")
        ] = None,
        allow: Annotated[
            list[str] | None,
            typer.Option(
                help="A key (or pattern with *) that may be missing, unknown or not finite."
            ),
        ] = None,
        shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest safetensors file.")] = 5.0,
        workers: Annotated[int | None, typer.Option(min=1, help="Files written at once.")] = None,
        overwrite: Annotated[
            bool,
            typer.Option("--overwrite", help="Replace what an earlier conversion wrote at DST."),
        ] = False,
    ) -> None:
        from onellm_dist.convert.commands import convert_command

        options = {
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
            convert_command(name, source, out, to, options, workers=workers, overwrite=overwrite)
        )

    return command


for _name, _about in ABOUT.items():
    _target = DEFAULT_TARGET[_name]
    _help = f"{_about} Written as {_target} unless --to says otherwise.\n\nExample: onellm convert {_name} {EXAMPLES[_name]} out --to {_target}"
    app.command(_name, help=_help, short_help=_about)(_converter(_name))


@app.command("assemble")
def convert_assemble(
    out: Annotated[Path, typer.Argument(help="The onellm directory to write.")],
    llm: Annotated[Path | None, typer.Option(help="An LLM of any format.")] = None,
    encoder: Annotated[
        str | None,
        typer.Option(
            help="A CLIP of any format; or timm:NAME, open-clip:NAME (docs/howto/conversion.md)."
        ),
    ] = None,
    base: Annotated[Path | None, typer.Option(help="A onellm model to extend instead.")] = None,
    experts: Annotated[int, typer.Option(min=1, help="Experts of a new model.")] = 3,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks an expert.")] = 8,
    router: Annotated[str, typer.Option(help="soft, constant or sparse.")] = "soft",
    init: Annotated[
        str, typer.Option(help="separate, or copied: all experts start as the first.")
    ] = "separate",
    upm_heads: Annotated[int | None, typer.Option(help="Default: width / 64.")] = None,
    modality: Annotated[
        list[str] | None,
        typer.Option(help="A modality of a new model (repeatable); all by default."),
    ] = None,
    add_experts: Annotated[
        int,
        typer.Option(min=0, help="Experts to add to --base, closed for its modalities at first."),
    ] = 0,
    add_modality: Annotated[
        list[str] | None, typer.Option(help="A modality to add to --base (repeatable).")
    ] = None,
    expert_init: Annotated[
        str, typer.Option(help="Added experts: copied (from the first) or separate (random).")
    ] = "copied",
    expert_noise: Annotated[
        float | None,
        typer.Option(min=0, help="Relative noise that tells copied experts apart; default 0.01."),
    ] = None,
    gate_bias: Annotated[
        float,
        typer.Option(
            help="Router bias of added experts in old modalities; their gate is its sigmoid."
        ),
    ] = -20.0,
    seed: Annotated[int, typer.Option(help="Of random parts.")] = 0,
    tokenizer: Annotated[
        Path | None, typer.Option(help="The LLM's tokenizer, where its folder has none.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="fp32, bf16 or fp16; default: parts keep their own, new ones are fp32."),
    ] = None,
    act: Annotated[
        str | None, typer.Option(help="For CLIP files that do not say it: quick_gelu or gelu.")
    ] = None,
    encoder_heads: Annotated[int | None, typer.Option(help="Default: width / 64.")] = None,
    llm_heads: Annotated[int | None, typer.Option(help="Default: params.json.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="A key that may be missing or unknown.")
    ] = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest safetensors file.")] = 5.0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier conversion wrote.")
    ] = False,
) -> None:
    """Put an LLM and an encoder together, ready for stage I; or give a trained model more experts and modalities.

    Example: onellm convert assemble --llm llama-2-7b --encoder clip-vit-large-patch14 models/onellm-7b-start
    """
    from onellm_dist.convert.commands import assemble_command

    options = {
        "tokenizer": tokenizer,
        "dtype": dtype,
        "act": act,
        "encoder_heads": encoder_heads,
        "llm_heads": llm_heads,
        "allow": allow,
        "shard_gb": shard_gb,
    }
    sizes = {
        "experts": experts,
        "blocks": blocks,
        "router": router,
        "init": init,
        "heads": upm_heads,
    }
    raise typer.Exit(
        assemble_command(
            out,
            options,
            sizes,
            llm=llm,
            encoder=encoder,
            base=base,
            modalities=modality,
            add_experts=add_experts,
            add_modalities=add_modality or [],
            expert_init=expert_init,
            expert_noise=expert_noise,
            gate_bias=gate_bias,
            seed=seed,
            overwrite=overwrite,
        )
    )


@app.command("verify")
def convert_verify(
    a: Annotated[Path, typer.Argument(help="A checkpoint of any format.")],
    b: Annotated[Path, typer.Argument(help="Another, of any format.")],
    logits: Annotated[
        bool,
        typer.Option(
            "--logits", help="Compare a forward on random inputs too (both models in memory, fp32)."
        ),
    ] = False,
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="Compare a forward on these: safetensors with input_ids, image_values, ..."
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Largest absolute difference that counts as the same.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    from_a: Annotated[
        str | None, typer.Option(help="A's format, where it is not recognised.")
    ] = None,
    from_b: Annotated[str | None, typer.Option(help="B's format.")] = None,
    encoder_heads: Annotated[int | None, typer.Option(help="Where a file does not say it.")] = None,
    upm_heads: Annotated[int | None, typer.Option(help="Where a file does not say it.")] = None,
    llm_heads: Annotated[int | None, typer.Option(help="Where a file does not say it.")] = None,
    act: Annotated[str | None, typer.Option(help="Where a CLIP does not say it.")] = None,
    base: Annotated[Path | None, typer.Option(help="For runs: what it started from.")] = None,
) -> None:
    """Compare two checkpoints of any two formats, tensor by tensor after mapping. Exit code 0: the same; 1: not.

    Example: onellm convert verify consolidated.00-of-01.pth onellm-7b
    """
    from onellm_dist.convert.commands import options_of
    from onellm_dist.convert.verify import verify_command

    options = options_of(
        {
            "encoder_heads": encoder_heads,
            "upm_heads": upm_heads,
            "llm_heads": llm_heads,
            "act": act,
            "base": base,
        }
    )
    raise typer.Exit(
        verify_command(
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


@app.command("inspect")
def convert_inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint of any format.")],
    format_name: Annotated[
        str | None, typer.Option("--from", help="Its format, where it is not recognised.")
    ] = None,
    base: Annotated[Path | None, typer.Option(help="For runs: what it started from.")] = None,
    act: Annotated[str | None, typer.Option(help="Where a CLIP does not say it.")] = None,
    llm_heads: Annotated[int | None, typer.Option(help="Where a file does not say it.")] = None,
) -> None:
    """Say what a checkpoint is: format, parameters by part, dtypes, world size, step, stage, what is missing.

    Example: onellm convert inspect runs/stage1_image
    """
    from onellm_dist.convert.commands import options_of
    from onellm_dist.convert.inspect import inspect_command

    raise typer.Exit(
        inspect_command(
            path, options_of({"base": base, "act": act, "llm_heads": llm_heads}), format_name
        )
    )
