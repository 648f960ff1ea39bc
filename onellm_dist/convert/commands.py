"""What `onellm convert ...` does with its arguments, and what it prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from onellm_dist.common.errors import EXIT_DONE, UsageError
from onellm_dist.convert.checkpoint import Opened, Options
from onellm_dist.convert.tokenizers import has_tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def options_of(given: Mapping[str, Any]) -> Options:
    """The options of a command line; those that are None stay at their defaults.

    Raises:
        UsageError: an unknown dtype or activation.
    """
    words = {key: value for key, value in given.items() if value is not None}
    if "dtype" in words:
        if words["dtype"] not in DTYPES:
            raise UsageError(
                f"--dtype {words['dtype']}",
                "no such precision.",
                f"use one of: {', '.join(DTYPES)}.",
            )
        words["dtype"] = DTYPES[words["dtype"]]
    if words.get("act", "gelu") not in ("gelu", "quick_gelu"):
        raise UsageError(f"--act {words['act']}", "no CLIP has it.", "use quick_gelu or gelu.")
    if "shard_gb" in words:
        words["shard_bytes"] = int(words.pop("shard_gb") * 1e9)
    if "allow" in words:
        words["allow"] = tuple(words["allow"])
    return Options(**words)


def convert_command(
    name: str,
    source: Path,
    out: Path,
    to: str | None,
    given: Mapping[str, Any],
    *,
    workers: int | None,
    overwrite: bool,
) -> int:
    """`onellm convert <name> SRC DST`. Returns the exit code."""
    from onellm_dist.convert.conversion import convert

    opened, record = convert(
        name, source, out, to=to, options=options_of(given), overwrite=overwrite, workers=workers
    )
    _tell(out, opened, record)
    return EXIT_DONE


def assemble_command(
    out: Path, given: Mapping[str, Any], sizes: Mapping[str, Any], **arguments: Any
) -> int:
    """`onellm convert assemble OUT ...`. Returns the exit code."""
    from onellm_dist.convert.assemble import UPMSizes, assemble

    opened, record = assemble(out, upm=UPMSizes(**sizes), options=options_of(given), **arguments)
    _tell(out, opened, record)
    return EXIT_DONE


def _tell(out: Path, opened: Opened, record: Mapping[str, Any]) -> None:
    size = sum(file["bytes"] for file in record["result"])
    parameters = sum(tensor.numel for tensor in opened.tensors.values())
    print(
        f"{out}: {parameters:,} parameters as {record['to']}, {size / 1e9:.2f} GB in {len(record['result'])} files"
    )
    if opened.ignored:
        print(f"left out, because nothing uses them: {', '.join(opened.ignored)}")
    if opened.made:
        print(
            f"{len(opened.made)} tensors come from no file and are initialised (conversion.json names them)"
        )
    if record["to"] == "onellm" and not has_tokenizer(out):
        print(
            f"{out} has no tokenizer: give --tokenizer to make it a whole onellm directory (onellm generate needs one)"
        )
