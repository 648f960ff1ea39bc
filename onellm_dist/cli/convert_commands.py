"""What `onellm convert ...` does with its arguments, and what it prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, UsageError
from onellm_dist.convert.assemble import UPMSizes, assemble
from onellm_dist.convert.checkpoint import ConversionOptions, OpenedCheckpoint
from onellm_dist.convert.conversion import convert
from onellm_dist.convert.extend import Additions
from onellm_dist.convert.inspect import describe_checkpoint
from onellm_dist.convert.integrity import check_integrity
from onellm_dist.convert.opening import open_checkpoint
from onellm_dist.convert.publish import check_publication, make_upload_command
from onellm_dist.convert.tensors.safetensors_files import read_safetensors
from onellm_dist.convert.tokenizers import has_tokenizer
from onellm_dist.convert.verify import compare

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_options(given: Mapping[str, Any]) -> ConversionOptions:
    """The options of a command line; those that are None keep their defaults.

    Args:
        given: name of an option -> what the user typed, or None.

    Raises:
        UsageError: an unknown dtype or activation.
    """
    chosen = {key: value for key, value in given.items() if value is not None}
    if "dtype" in chosen:
        if chosen["dtype"] not in DTYPES:
            raise UsageError(
                f"--dtype {chosen['dtype']}",
                "there is no such precision.",
                f"use one of: {', '.join(DTYPES)}.",
            )
        chosen["dtype"] = DTYPES[chosen["dtype"]]
    if chosen.get("act", "gelu") not in ("gelu", "quick_gelu"):
        raise UsageError(
            f"--act {chosen['act']}", "no CLIP has this activation.", "use quick_gelu or gelu."
        )
    if "shard_gb" in chosen:
        chosen["shard_bytes"] = int(chosen.pop("shard_gb") * 1e9)
    if "allow" in chosen:
        chosen["allow"] = tuple(chosen["allow"])
    return ConversionOptions(**chosen)


def run_convert(
    name: str,
    source: Path,
    out: Path,
    to: str | None,
    given: Mapping[str, Any],
    *,
    workers: int | None,
    overwrite: bool,
) -> int:
    """`onellm convert NAME SRC DST`. Returns the exit code.

    Args:
        name: name of the source's format.
        source: the checkpoint.
        out: the folder to write.
        to: name of the format to write; None: the usual one.
        given: options of the command line.
        workers: files written at once.
        overwrite: replace what an earlier conversion wrote.
    """
    opened, record = convert(
        name,
        source,
        out,
        to=to,
        options=build_options(given),
        overwrite=overwrite,
        workers=workers,
    )
    _print_result(out, opened, record)
    return EXIT_DONE


def run_assemble(out: Path, **given: Any) -> int:
    """`onellm convert assemble OUT ...`. Returns the exit code.

    Args:
        out: the directory to write.
        given: name of an option -> what the user typed, or its default.
    """
    sizes = UPMSizes(
        experts=given["experts"],
        blocks=given["blocks"],
        router=given["router"],
        init=given["init"],
        heads=given["upm_heads"],
    )
    additions = Additions(
        experts=given["add_experts"],
        modalities=given["add_modality"] or (),
        expert_init=given["expert_init"],
        expert_noise=given["expert_noise"],
        router_bias=given["router_bias"],
    )
    shared = ("tokenizer", "dtype", "act", "encoder_heads", "llm_heads", "allow", "shard_gb")
    opened, record = assemble(
        out,
        llm=given["llm"],
        encoder=given["encoder"],
        base=given["base"],
        upm=sizes,
        modalities=given["modality"],
        additions=additions,
        seed=given["seed"],
        options=build_options({name: given[name] for name in shared}),
        overwrite=given["overwrite"],
    )
    _print_result(out, opened, record)
    return EXIT_DONE


def _print_result(out: Path, opened: OpenedCheckpoint, record: Mapping[str, Any]) -> None:
    files = record["result"]
    size = sum(file["bytes"] for file in files)
    parameters = sum(tensor.numel for tensor in opened.tensors.values())
    print(
        f"{out}: {parameters:,} parameters as {record['to']}, {size / 1e9:.2f} GB in "
        f"{format_count(len(files), 'file')}"
    )
    if opened.ignored:
        print(f"left out, because nothing uses them: {', '.join(opened.ignored)}")
    if opened.initialised:
        print(
            f"initialised, because no file has them: "
            f"{format_count(len(opened.initialised), 'tensor')} (conversion.json names them)"
        )
    if record["to"] == "onellm" and not has_tokenizer(out):
        print(f"{out} has no tokenizer, which onellm generate needs: convert with --tokenizer")


def run_verify(
    a: Path,
    b: Path,
    options: ConversionOptions,
    *,
    logits: bool = False,
    inputs: Path | None = None,
    tolerance: float = 0.0,
    seed: int = 0,
    from_a: str | None = None,
    from_b: str | None = None,
) -> int:
    """`onellm convert verify A B`: print what differs. Returns the exit code: 0 the same, 1 not.

    Args:
        a: a checkpoint.
        b: another checkpoint.
        options: options of both.
        logits: compare a forward on random inputs.
        inputs: compare a forward on the inputs in this safetensors file.
        tolerance: largest absolute difference that counts as the same.
        seed: seed of random inputs.
        from_a: format of A; None: the one that is recognised.
        from_b: format of B; None: the one that is recognised.
    """
    left, right = open_checkpoint(a, options, from_a), open_checkpoint(b, options, from_b)
    check_integrity(left)
    check_integrity(right)
    tensors = None if inputs is None else read_safetensors(inputs)
    found = compare(
        left,
        right,
        inputs=None if tensors is None else {name: t.read() for name, t in tensors.items()},
        logits=logits or inputs is not None,
        seed=seed,
        quiet=False,
    )
    print(f"A {a}: {left.format}\nB {b}: {right.format}", *found.describe(), sep="\n")
    if not found.is_equal(tolerance):
        print("NOT the same")
        return EXIT_FAILED
    print("the same" if tolerance == 0 else f"the same within {tolerance:g}")
    return EXIT_DONE


def run_inspect(path: Path, options: ConversionOptions, format_name: str | None) -> int:
    """`onellm convert inspect PATH`. Returns the exit code: 1 if keys do not fit.

    Args:
        path: the checkpoint.
        options: options of the command line.
        format_name: its format; None: the one that is recognised.
    """
    opened = open_checkpoint(path, options, format_name)
    print(path, *describe_checkpoint(opened), sep="\n")
    return EXIT_FAILED if opened.problems else EXIT_DONE


def run_publish(folder: Path, repository: str, *, load: bool) -> int:
    """Check a model before it is published, and print what was found.

    Args:
        folder: a onellm directory.
        repository: OWNER/NAME on the Hub.
        load: whether to load it without this package.

    Returns:
        The exit code.
    """
    command = make_upload_command(folder, repository)
    findings = check_publication(folder, load=load)
    for finding in findings:
        print(f"{finding.level:8}{finding.what}")
    if any(finding.level == "wrong" for finding in findings):
        print("not ready: fix what is wrong first")
        return EXIT_FAILED
    print(f"to upload it: {command}")
    return EXIT_DONE
