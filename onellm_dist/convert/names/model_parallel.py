"""Numbered files of Meta and the reference: one state dict, or parts by model-parallel rank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.tensors.lazy import LazyTensor, Tensors, concatenate
from onellm_dist.convert.tensors.safetensors_files import read_state_file

_NUMBERED = re.compile(r"consolidated\.(\d+)(?:-of-(\d+))?\.(pth|safetensors)")
_SPLIT = (
    (re.compile(r".*\.(wq|wk|wv|w1|w3)\.weight|output\.weight"), 0),
    (re.compile(r".*\.(wo|w2)\.weight"), 1),
)
"""Weights that are split over ranks, and in which dimension.

They are fairscale's ColumnParallelLinear and RowParallelLinear."""


def find_numbered_files(path: Path) -> tuple[Path, ...]:
    """All files of a checkpoint.

    Args:
        path: a folder, the first of several files, or the only file.

    Raises:
        UsageError: there is no such file, or one of the numbers is missing.
    """
    if path.is_file() and not _NUMBERED.fullmatch(path.name):
        return (path,)
    folder = path if path.is_dir() else path.parent
    found = {
        int(m[1]): (file, m[2])
        for file in sorted(folder.glob("consolidated.*"))
        if (m := _NUMBERED.fullmatch(file.name))
    }
    if not found or (not path.is_dir() and not path.is_file()):
        raise UsageError(
            f"no checkpoint {path}",
            "there is nothing to convert.",
            "give consolidated.00.pth, consolidated.00-of-01.pth, their folder, or a .safetensors "
            "file.",
        )
    totals = {int(total) for _, total in found.values() if total}
    count = max(totals, default=max(found) + 1)
    absent = sorted(set(range(count)) - set(found))
    if absent or len(totals) > 1:
        numbers = ", ".join(map(str, absent)) or "disagree"
        raise UsageError(
            f"{folder}: {len(absent)} of {count} model-parallel files are missing: "
            f"numbers {numbers}",
            "each holds a part of every large tensor.",
            "download or copy them all.",
        )
    return tuple(found[i][0] for i in range(count))


def merge_files(files: Sequence[Path], *, width_of: str | None) -> Tensors:
    """The state dict in `files`, with model-parallel parts joined.

    Args:
        files: the files, by rank.
        width_of: key of a weight [rows, width] that is split by rows; its width shows how
            embeddings are split.

    Raises:
        UsageError: a file cannot be read, or the files have different keys.
    """
    states = [read_state_file(file) for file in files]
    if len(states) == 1:
        return states[0]
    for file, state in zip(files[1:], states[1:], strict=True):
        if unlike := sorted(set(state) ^ set(states[0])):
            raise UsageError(
                f"{file.name} and {files[0].name} have different keys: {', '.join(unlike[:10])}",
                "they are not parts of one checkpoint.",
                "download them again.",
            )
    width = states[0][width_of].shape[1] if width_of in states[0] else 0
    joined: Tensors = {}
    for key in states[0]:
        parts = [state[key] for state in states]
        # Only LLM and UPM are split: the other parts have no wq, w1 or output.weight.
        dim = get_split_dimension(key.removeprefix("llma."), parts, width)
        joined[key] = (
            _open_replicated(key, parts, files) if dim is None else concatenate(parts, dim)
        )
    return joined


def get_split_dimension(key: str, parts: Sequence[LazyTensor], width: int) -> int | None:
    """The dimension in which files hold parts of a weight; None: each file holds all of it.

    Embeddings are split by columns in LLaMA 1 and 2 (ParallelEmbedding), by words in LLaMA 3.

    Args:
        key: Meta's key.
        parts: the tensor of each file.
        width: columns of the complete embedding.
    """
    if key == "tok_embeddings.weight":
        return 0 if parts[0].shape[1] == width else 1
    return next((dim for pattern, dim in _SPLIT if pattern.fullmatch(key)), None)


def _open_replicated(key: str, parts: Sequence[LazyTensor], files: Sequence[Path]) -> LazyTensor:
    """A tensor that every file holds completely; reading it compares them."""

    def load() -> torch.Tensor:
        first = parts[0].read()
        for part, file in zip(parts[1:], files[1:], strict=True):
            if not torch.equal(part.read(), first):
                raise UsageError(
                    f"{key} differs between {files[0].name} and {file.name}",
                    "every model-parallel file should hold the same values.",
                    "these files are not of one checkpoint: download them again.",
                )
        return first

    return LazyTensor(parts[0].shape, parts[0].dtype, load)
