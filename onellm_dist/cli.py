"""The `onellm` command. It only wires: each command imports its room when it is called, so that `--help` is instant."""

from __future__ import annotations

import inspect
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from onellm_dist.convert.registry import ABOUT, DEFAULT_TARGET, EXAMPLES
from onellm_dist.errors import EXIT_DONE, OneLLMError, UsageError

app = typer.Typer(
    name="onellm",
    help="A distributed trainer for multimodal LLMs: eight modalities, tar shards, exact resumes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
shards_app = typer.Typer(no_args_is_help=True, help="Build, index and check tar shards.")
convert_app = typer.Typer(
    no_args_is_help=True,
    help="Convert checkpoints: `onellm convert FROM SRC DST [--to TO]`; assemble, compare and inspect them.",
)
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
def doctor(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of the recipe (with --distributed).", metavar="[KEY=VALUE]...")
    ] = None,
    distributed: Annotated[bool, typer.Option("--distributed", help="Look at every node and the links between them.")] = False,
    recipe: Annotated[Path | None, typer.Option(help="Its run.dir, data and needs are checked too.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Local ranks, where no launcher started us.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    exclude_file: Annotated[Path | None, typer.Option(help="Write the bad nodes there, as Slurm's --exclude takes them.")] = None,
    max_skew: Annotated[float, typer.Option(min=0, help="Seconds that a clock may be off the nodes' median.")] = 2.0,
    min_bandwidth: Annotated[float, typer.Option(min=0, help="GB/s of an all-reduce between two nodes; 0: only compare nodes.")] = 0.0,
    min_disk: Annotated[float, typer.Option(min=0, help="MB/s of writing to run.dir; 0: only compare nodes.")] = 0.0,
    wait: Annotated[float, typer.Option(min=1, help="Seconds to wait for ranks that have not come.")] = 180.0,
    limit: Annotated[float, typer.Option(min=1, help="Most seconds of each check.")] = 60.0,
) -> None:
    """Say what this machine has and what would go wrong: versions, attention kernels, GPUs, launchers; or look at all nodes of a job.

    Examples: onellm doctor
              srun onellm doctor --distributed --recipe stage1_image run.dir=/scratch/stage1 --exclude-file bad_nodes
    """
    if distributed:
        from onellm_dist.preflight.options import Options
        from onellm_dist.preflight.run import run_preflight

        options = Options(
            recipe=recipe, overrides=tuple(overrides or ()), wait=wait, limit=limit, max_skew=max_skew, min_bandwidth=min_bandwidth,
            min_disk=min_disk, exclude_file=exclude_file, as_json=as_json,
        )  # fmt: skip
        raise typer.Exit(run_preflight(options, local_ranks=ranks))
    if overrides or recipe:
        raise UsageError(
            f"{' '.join(overrides or [str(recipe)])}: a recipe is looked at with --distributed only",
            "nothing was checked.",
            "add --distributed.",
        )
    from onellm_dist.doctor import run_doctor

    raise typer.Exit(run_doctor())


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The run.dir of a run, going or ended.", metavar="RUN")],
    out: Annotated[Path | None, typer.Option(help="The HTML page to write.  [default: RUN/report.html]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON; write a page only with --out.")] = False,
) -> None:
    """Write one HTML page about a run over all its restarts: loss, goodput, restarts, resume time, stalls, what to look at first.

    Example: onellm report runs/stage1_image
    """
    from onellm_dist.report.command import report_command

    raise typer.Exit(report_command(run, out, as_json=as_json))


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


@app.command()
def ledger(
    run: Annotated[Path, typer.Argument(help="A run's directory; the run may be going on.")],
    step: Annotated[int | None, typer.Option(help="Which samples this step had; the first is 0.")] = None,
    sample: Annotated[str | None, typer.Option(help="At which steps this sample comes: dataset/shard/key, a key, or a beginning.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say which samples were trained on at a step, or at which steps a sample was or will be seen.

    Example: onellm ledger runs/stage1_image --step 120
    """
    from onellm_dist.train.ledger_command import ledger_command

    raise typer.Exit(ledger_command(run, step, sample, as_json=as_json))


@app.command()
def launch(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, or the name of one that ships (stage1_image).")],
    nodes: Annotated[str, typer.Option(help="Nodes: 2, or 1-4 for as many of four as there are.")] = "1",
    gpus_per_node: Annotated[int, typer.Option(min=0, help="GPUs, and ranks, a node.")] = 8,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Where it is not the GPUs' number: runs on CPUs.")] = None,
    starter: Annotated[str, typer.Option("--with", help="How ranks start: srun, torchrun or deepspeed (pdsh).")] = "srun",
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe (repeatable).")] = None,
    time: Annotated[str | None, typer.Option(help="Time limit as Slurm writes it [24:00:00].")] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm quality of service.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Nodes to keep away from: gpu[07,12].")] = None,
    cpus_per_rank: Annotated[int | None, typer.Option(min=1, help="Cores a rank, to share nodes; default: whole nodes.")] = None,
    container: Annotated[str | None, typer.Option(help="Image to run in.")] = None,
    container_runtime: Annotated[str | None, typer.Option(help="pyxis (Enroot) or apptainer [pyxis].")] = None,
    mount: Annotated[list[str] | None, typer.Option(help="A folder that the container sees (repeatable), besides the run's.")] = None,
    max_requeues: Annotated[
        int | None, typer.Option(min=0, help="Failures in a row, without a new checkpoint, before it halts [5].")
    ] = None,
    signal_notice: Annotated[
        int | None, typer.Option(help="Seconds of notice before the time limit; the last save must fit [300].")
    ] = None,
    preflight: Annotated[bool, typer.Option(help="Look at every node before the ranks start; keep away from bad ones.")] = False,
    job_name: Annotated[str | None, typer.Option(help="Default: the recipe's name.")] = None,
    python: Annotated[str | None, typer.Option(help="The interpreter on the nodes; default: this one.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: stdout, or RUN_DIR/job.sbatch with --submit.")] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit it, too.")] = False,
) -> None:
    """Render a Slurm job script for a recipe, check it, and submit it on request. It requeues and resumes by itself.

    Examples: onellm launch stage1_image --nodes 2 --gpus-per-node 8 --set run.dir=/scratch/stage1 --submit
              onellm launch tune --nodes 1-4 --with torchrun --time 12:00:00 --partition gpu --out tune.sbatch
    """
    from onellm_dist.launch.submit import launch_command

    options = {
        "gpus_per_node": gpus_per_node, "ranks_per_node": ranks_per_node, "starter": starter, "time": time, "partition": partition,
        "account": account, "qos": qos, "exclude": exclude, "cpus_per_rank": cpus_per_rank, "container": container,
        "container_runtime": container_runtime, "max_requeues": max_requeues, "signal_notice_s": signal_notice, "name": job_name,
        "python": python, "mounts": mount or [], "preflight": preflight,
    }  # fmt: skip
    command = shlex.join(["onellm", *sys.argv[1:]])
    raise typer.Exit(launch_command(recipe, settings or [], nodes=nodes, out=out, submit=submit, command=command, **options))


@app.command()
def rehearse(
    recipe: Annotated[Path, typer.Argument(help="A recipe file, or the name of one that ships.")] = Path("toy/align_image"),
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the throw-away Slurm.")] = 2,
    ranks_per_node: Annotated[int, typer.Option(min=1, help="Ranks a node; all share this machine's cores.")] = 2,
    starter: Annotated[str, typer.Option("--with", help="How ranks start: srun, torchrun or deepspeed (pdsh).")] = "srun",
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value of the recipe (repeatable).")] = None,
    preflight: Annotated[bool, typer.Option(help="Rehearse the script with the preflight in it.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="A scenario (repeatable); default: all five.")] = None,
    out: Annotated[Path, typer.Option(help="Run directories, logs and job scripts.")] = Path("runs/rehearsal"),
) -> None:
    """Rehearse a recipe at toy size under a real, throw-away Slurm on this machine: its own job script is run clean, preempted, with a
    rank killed, with a node lost, and back at another node count; samples and losses must be those of the clean run.

    Example: onellm rehearse stage1_image --nodes 2 --ranks-per-node 2
    """
    from onellm_dist.slurm.rehearse import rehearse_command

    raise typer.Exit(
        rehearse_command(
            recipe,
            settings or [],
            nodes=nodes,
            ranks_per_node=ranks_per_node,
            starter=starter,
            out=out,
            only=only or (),
            preflight=preflight,
        )
    )


class _BuildCommand(TyperCommand):
    """`onellm shards build`: its flags are those of the source too, and `SOURCE --help` lists them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if all(a.startswith("-") for a in args):  # no source is named: nothing to import
            return super().parse_args(ctx, args)
        from onellm_dist.shards.arguments import expanded, source_help, source_in

        source = source_in(args)
        if source is not None and "--help" in args:
            print(source_help(source))
            ctx.exit()
        own = [flag for parameter in self.get_params(ctx) for flag in parameter.opts]
        return super().parse_args(ctx, expanded(args, own))


@shards_app.command("build", cls=_BuildCommand)
def shards_build(
    source: Annotated[str, typer.Argument(help="A source (toyworld, folder, webvid, ...; docs/data.md), or a dataset recipe (YAML).")],
    paths: Annotated[
        list[Path] | None, typer.Argument(help="IN OUT, or OUT alone where the source makes its data.", metavar="[IN] OUT")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="key=value of the source; also --key value. SOURCE --help lists them.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes; never changes the bytes written.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of sources that draw.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands at OUT, finished or not.")] = False,
    task: Annotated[str, typer.Option(help="INDEX/COUNT: build only this process's share (Slurm arrays).")] = "0/1",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be built; write nothing.")] = False,
) -> None:
    """Build shards and their index. A build that was stopped goes on; processes called alike share the work.

    Examples: onellm shards build toyworld toy
              onellm shards build folder photos/ photo_shards --option modality=image
              onellm shards build cc3m-depth cc3m/ cc3m_depth_shards --depth-model models/dpt-large
              srun -n 64 onellm shards build laion400m laion/ laion_shards --workers 8
    """
    from onellm_dist.shards.build import build_command

    raise typer.Exit(
        build_command(source, paths or [], option or [], workers=workers, seed=seed, overwrite=overwrite, task=task, dry_run=dry_run)
    )


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


@shards_app.command("repair")
def shards_repair(dataset: Annotated[Path, typer.Argument(help="A dataset folder.")]) -> None:
    """Mend what verify finds: indexes are made again, bad samples left out, good ones never; old tars stay beside.

    Example: onellm shards repair toy/image
    """
    from onellm_dist.shards.repair import repair_command

    raise typer.Exit(repair_command(dataset))


@shards_app.command("stats")
def shards_stats(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("stats.html"),
    seed: Annotated[int, typer.Option(help="Which examples are shown.")] = 0,
) -> None:
    """Write one HTML page: counts, lengths, durations, captions, what was left out and why.

    Example: onellm shards stats toy/audio --out audio.html
    """
    from onellm_dist.shards.page import page_command

    raise typer.Exit(page_command(dataset, out, previews=0, seed=seed))


@shards_app.command("preview")
def shards_preview(
    dataset: Annotated[Path, typer.Argument(help="A dataset folder.")],
    out: Annotated[Path, typer.Option(help="The HTML page to write.")] = Path("preview.html"),
    samples: Annotated[int, typer.Option("--samples", "-n", min=1, help="Samples to draw.")] = 24,
    seed: Annotated[int, typer.Option(help="Which samples are drawn.")] = 0,
) -> None:
    """The page of stats, with samples drawn as people look at them.

    Example: onellm shards preview toy/depth -n 40
    """
    from onellm_dist.shards.page import page_command

    raise typer.Exit(page_command(dataset, out, previews=samples, seed=seed))


@shards_app.command("energon")
def shards_energon(dataset: Annotated[Path, typer.Argument(help="A dataset folder.")]) -> None:
    """Write Megatron-Energon's metadata into a dataset (planned builds do it by themselves).

    Example: onellm shards energon toy/image
    """
    from onellm_dist.shards.energon import write_energon

    write_energon(dataset)
    print(f"{dataset}: .nv-meta/ and .tar.idx are written")


def _converter(name: str) -> Any:
    """The command `onellm convert <name>`: all formats take the same options."""

    def command(
        source: Annotated[Path, typer.Argument(help="The checkpoint: a file or a folder.", metavar="SRC")],
        out: Annotated[Path, typer.Argument(help="The folder to write.", metavar="DST")],
        to: Annotated[str | None, typer.Option(help="onellm, reference, meta-llama, hf, open-clip or hf-clip; default: see above.")] = None,
        tokenizer: Annotated[Path | None, typer.Option(help="The LLM's tokenizer: a file or a folder.")] = None,
        dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: each tensor keeps its own.")] = None,
        base: Annotated[Path | None, typer.Option(help="For runs: the onellm directory that it started from.")] = None,
        act: Annotated[str | None, typer.Option(help="For CLIP files that do not say it: quick_gelu or gelu.")] = None,
        encoder_heads: Annotated[int | None, typer.Option(help="Default: width / 64.")] = None,
        upm_heads: Annotated[int | None, typer.Option(help="Default: width / 64.")] = None,
        llm_heads: Annotated[int | None, typer.Option(help="Default: params.json, or width / 128.")] = None,
        allow: Annotated[
            list[str] | None, typer.Option(help="A key (or pattern with *) that may be missing, unknown or not finite.")
        ] = None,
        shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest safetensors file.")] = 5.0,
        workers: Annotated[int | None, typer.Option(min=1, help="Files written at once.")] = None,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier conversion wrote at DST.")] = False,
    ) -> None:
        from onellm_dist.convert.commands import convert_command

        options = {
            "tokenizer": tokenizer, "dtype": dtype, "base": base, "act": act, "encoder_heads": encoder_heads, "upm_heads": upm_heads,
            "llm_heads": llm_heads, "allow": allow, "shard_gb": shard_gb,
        }  # fmt: skip
        raise typer.Exit(convert_command(name, source, out, to, options, workers=workers, overwrite=overwrite))

    return command


for _name, _about in ABOUT.items():
    _target = DEFAULT_TARGET[_name]
    _help = (
        f"{_about} Written as {_target} unless --to says otherwise.\n\nExample: onellm convert {_name} {EXAMPLES[_name]} out --to {_target}"
    )
    convert_app.command(_name, help=_help, short_help=_about)(_converter(_name))


@convert_app.command("assemble")
def convert_assemble(
    out: Annotated[Path, typer.Argument(help="The onellm directory to write.")],
    llm: Annotated[Path | None, typer.Option(help="An LLM of any format.")] = None,
    encoder: Annotated[str | None, typer.Option(help="A CLIP of any format; or timm:NAME, open-clip:NAME (docs/conversion.md).")] = None,
    base: Annotated[Path | None, typer.Option(help="A onellm model to extend instead.")] = None,
    experts: Annotated[int, typer.Option(min=1, help="Experts of a new model.")] = 3,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks an expert.")] = 8,
    router: Annotated[str, typer.Option(help="soft, constant or sparse.")] = "soft",
    init: Annotated[str, typer.Option(help="separate, or copied: all experts start as the first.")] = "separate",
    upm_heads: Annotated[int | None, typer.Option(help="Default: width / 64.")] = None,
    modality: Annotated[list[str] | None, typer.Option(help="A modality of a new model (repeatable); all by default.")] = None,
    add_experts: Annotated[int, typer.Option(min=0, help="Experts to add to --base, closed for its modalities at first.")] = 0,
    add_modality: Annotated[list[str] | None, typer.Option(help="A modality to add to --base (repeatable).")] = None,
    expert_init: Annotated[str, typer.Option(help="Added experts: copied (from the first) or separate (random).")] = "copied",
    expert_noise: Annotated[float | None, typer.Option(min=0, help="Relative noise that tells copied experts apart; default 0.01.")] = None,
    gate_bias: Annotated[float, typer.Option(help="Router bias of added experts in old modalities; their gate is its sigmoid.")] = -20.0,
    seed: Annotated[int, typer.Option(help="Of random parts.")] = 0,
    tokenizer: Annotated[Path | None, typer.Option(help="The LLM's tokenizer, where its folder has none.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16; default: parts keep their own, new ones are fp32.")] = None,
    act: Annotated[str | None, typer.Option(help="For CLIP files that do not say it: quick_gelu or gelu.")] = None,
    encoder_heads: Annotated[int | None, typer.Option(help="Default: width / 64.")] = None,
    llm_heads: Annotated[int | None, typer.Option(help="Default: params.json.")] = None,
    allow: Annotated[list[str] | None, typer.Option(help="A key that may be missing or unknown.")] = None,
    shard_gb: Annotated[float, typer.Option(min=0.001, help="Largest safetensors file.")] = 5.0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier conversion wrote.")] = False,
) -> None:
    """Put an LLM and an encoder together, ready for stage I; or give a trained model more experts and modalities.

    Example: onellm convert assemble --llm llama-2-7b --encoder clip-vit-large-patch14 models/onellm-7b-start
    """
    from onellm_dist.convert.commands import assemble_command

    options = {
        "tokenizer": tokenizer, "dtype": dtype, "act": act, "encoder_heads": encoder_heads, "llm_heads": llm_heads, "allow": allow,
        "shard_gb": shard_gb,
    }  # fmt: skip
    sizes = {"experts": experts, "blocks": blocks, "router": router, "init": init, "heads": upm_heads}
    raise typer.Exit(
        assemble_command(
            out, options, sizes, llm=llm, encoder=encoder, base=base, modalities=modality, add_experts=add_experts,
            add_modalities=add_modality or [], expert_init=expert_init, expert_noise=expert_noise, gate_bias=gate_bias, seed=seed,
            overwrite=overwrite,
        )
    )  # fmt: skip


@convert_app.command("verify")
def convert_verify(
    a: Annotated[Path, typer.Argument(help="A checkpoint of any format.")],
    b: Annotated[Path, typer.Argument(help="Another, of any format.")],
    logits: Annotated[bool, typer.Option("--logits", help="Compare a forward on random inputs too (both models in memory, fp32).")] = False,
    inputs: Annotated[Path | None, typer.Option(help="Compare a forward on these: safetensors with input_ids, image_values, ...")] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Largest absolute difference that counts as the same.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random inputs.")] = 0,
    from_a: Annotated[str | None, typer.Option(help="A's format, where it is not recognised.")] = None,
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

    options = options_of({"encoder_heads": encoder_heads, "upm_heads": upm_heads, "llm_heads": llm_heads, "act": act, "base": base})
    raise typer.Exit(
        verify_command(a, b, options, logits=logits, inputs=inputs, tolerance=tolerance, seed=seed, from_a=from_a, from_b=from_b)
    )


@convert_app.command("inspect")
def convert_inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint of any format.")],
    format_name: Annotated[str | None, typer.Option("--from", help="Its format, where it is not recognised.")] = None,
    base: Annotated[Path | None, typer.Option(help="For runs: what it started from.")] = None,
    act: Annotated[str | None, typer.Option(help="Where a CLIP does not say it.")] = None,
    llm_heads: Annotated[int | None, typer.Option(help="Where a file does not say it.")] = None,
) -> None:
    """Say what a checkpoint is: format, parameters by part, dtypes, world size, step, stage, what is missing.

    Example: onellm convert inspect runs/stage1_image
    """
    from onellm_dist.convert.commands import options_of
    from onellm_dist.convert.inspect import inspect_command

    raise typer.Exit(inspect_command(path, options_of({"base": base, "act": act, "llm_heads": llm_heads}), format_name))


def _generate(
    model: Annotated[Path, typer.Argument(help="A onellm directory.")],
    prompt: Annotated[str, typer.Argument(help="What to ask; empty: caption the input.")] = "",
    order: Annotated[str, typer.Option(help="Order of the inputs in the sequence, by comma: video,audio.")] = "",
    prompt_format: Annotated[str, typer.Option("--format", help="auto, conversation, chat or raw.")] = "auto",
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
