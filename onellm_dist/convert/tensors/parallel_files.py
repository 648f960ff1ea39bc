"""Meta's and the reference's numbered files: one whole state dict, or a part of it for each model-parallel rank."""

from __future__ import annotations

import re
from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.names.llama import same_across_ranks, split_dimension
from onellm_dist.convert.tensors.lazy import LazyTensor, concatenated
from onellm_dist.convert.tensors.safetensors_files import read_state_file

_NUMBERED = re.compile(r"consolidated\.(\d+)(?:-of-(\d+))?\.(pth|safetensors)")


def numbered_files(path: Path) -> tuple[Path, ...]:
    """All the files of the checkpoint that `path` names: a folder, the first of several files, or one file.

    Raises:
        UsageError: there is none, or one of the numbers is missing.
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
            "give consolidated.00.pth, consolidated.00-of-01.pth, the folder of it, or a .safetensors file.",
        )
    told = {int(total) for _, total in found.values() if total}
    count = max(told, default=max(found) + 1)
    absent = sorted(set(range(count)) - set(found))
    if absent or len(told) > 1:
        raise UsageError(
            f"{folder}: {len(absent)} of {count} model-parallel files are missing: numbers {', '.join(map(str, absent)) or 'disagree'}",
            "each holds a part of every large tensor.",
            "download or copy them all.",
        )
    return tuple(found[i][0] for i in range(count))


def merged(files: tuple[Path, ...], *, width_of: str | None) -> dict[str, LazyTensor]:
    """The state dict in `files`, model-parallel parts put together.

    Args:
        width_of: key of a weight [rows, width] that is split by rows, which tells how embeddings are split.

    Raises:
        UsageError: not such files, or they have different keys.
    """
    states = [read_state_file(file) for file in files]
    if len(states) == 1:
        return states[0]
    for file, state in zip(files[1:], states[1:], strict=True):
        if unlike := sorted(set(state) ^ set(states[0])):
            raise UsageError(
                f"{file.name} and {files[0].name} have different keys: {', '.join(unlike[:10])}",
                "they are no parts of one checkpoint.",
                "download them again.",
            )
    width = states[0][width_of].shape[1] if width_of in states[0] else 0
    whole: dict[str, LazyTensor] = {}
    for key in states[0]:
        parts = [state[key] for state in states]
        # CLIP has no wq, w1 or output.weight, tokenizers and projections neither: only LLM and UPM are split.
        dim = split_dimension(key.removeprefix("llma."), parts, width)
        whole[key] = (
            same_across_ranks(key, parts, list(files)) if dim is None else concatenated(parts, dim)
        )
    return whole
