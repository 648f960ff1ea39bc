"""Open a checkpoint of any format."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from onellm_dist.common.checksums import check_small_files
from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import (
    ArchiveRange,
    ConversionOptions,
    KeyProblem,
    OpenedCheckpoint,
    TrainedWeights,
)
from onellm_dist.convert.integrity import attach_checksums
from onellm_dist.convert.registry import import_format, recognise_format
from onellm_dist.convert.tensors.lazy import Tensors

_WRAPPER_PREFIXES = ("module.", "model.", "state_dict.", "app.")
"""What wrappers put before every name."""


def open_checkpoint(
    path: Path, options: ConversionOptions | None = None, format_name: str | None = None
) -> OpenedCheckpoint:
    """Open a checkpoint; keys that do not fit are listed in its `problems`.

    Args:
        path: a file or a folder.
        options: what the user chose.
        format_name: name of its format; default: the format that is recognised.

    Raises:
        UsageError: not a checkpoint of that format, damaged, or it needs a base model and none is
            given.
    """
    check_small_files(path if path.is_dir() else path.parent)
    return attach_checksums(_open(path, options or ConversionOptions(), format_name))


def _open(path: Path, options: ConversionOptions, format_name: str | None) -> OpenedCheckpoint:
    module = import_format(format_name or recognise_format(path))
    opened: OpenedCheckpoint | TrainedWeights = module.open_checkpoint(path, options)
    if isinstance(opened, OpenedCheckpoint):
        return opened
    if options.base is None:
        raise UsageError(
            f"{opened.root} holds weights and no config",
            "architecture and frozen weights come from the model that the run started from.",
            "give --base DIR.",
        )
    base = open_checkpoint(options.base, options)
    archives = opened.archives or tuple(ArchiveRange(path) for path in opened.files)
    return replace(_replace_weights(base, opened), archives=(*archives, *base.archives))


def _replace_weights(base: OpenedCheckpoint, trained: TrainedWeights) -> OpenedCheckpoint:
    """The base with trained weights in place of its own, in the dtypes of the trained ones."""
    given = _strip_wrappers(trained.tensors, base.tensors)
    wrong = [
        KeyProblem("unexpected", name, str(list(tensor.shape)))
        for name, tensor in given.items()
        if name not in base.tensors
    ]
    for name, tensor in given.items():
        if name in base.tensors and base.tensors[name].shape != tensor.shape:
            shapes = f"has shape {list(tensor.shape)}, the base {list(base.tensors[name].shape)}"
            wrong.append(KeyProblem("mismatched", name, shapes))
    refused = {problem.name for problem in wrong}
    tensors = {**base.tensors, **{n: t for n, t in given.items() if n not in refused}}
    return replace(
        base,
        format=trained.format,
        tensors=tensors,
        files=(*trained.files, *base.files),
        problems=(*base.problems, *wrong),
        notes={**trained.notes, "trained tensors": f"{len(given)} of {len(tensors)}"},
    )


def _strip_wrappers(given: Tensors, wanted: Tensors) -> Tensors:
    """Names without what wrappers put before all of them."""
    while given and not any(name in wanted for name in given):
        prefix = next(
            (p for p in _WRAPPER_PREFIXES if all(name.startswith(p) for name in given)), None
        )
        if prefix is None:
            break
        given = {name.removeprefix(prefix): tensor for name, tensor in given.items()}
    return given
