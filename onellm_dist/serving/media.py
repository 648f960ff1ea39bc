"""The files of a question as model inputs, decoded where a broken one can do no harm."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.common.logging import get_logger
from onellm_dist.common.workers.samples import SampleFunction, SampleLimits, SamplePool
from onellm_dist.common.workers.words import PoolWords
from onellm_dist.modalities import get_modality
from onellm_dist.modalities.base import Modality
from onellm_dist.modalities.files import read_file

if TYPE_CHECKING:
    import torch

_log = get_logger(__name__)
_WORDS = PoolWords(
    worker="reading process",
    result="file",
    parent="command",
    seconds="the limit of a file",
    megabytes="the limit of a file",
    fewer="close other programs",
)


class _File(NamedTuple):
    modality: Modality
    path: Path


def read_files(
    files: Sequence[tuple[str, Path]], limits: SampleLimits | None = None
) -> dict[str, torch.Tensor]:
    """Read files as model inputs, with the evaluation transforms.

    Args:
        files: (modality, file) pairs.
        limits: the time and the memory that a file may take; default: those of training's recipes.

    Returns:
        Modality to [1, *value_shape] fp32.

    Raises:
        UsageError: a file or a modality does not exist.
        SampleError: a file cannot be decoded within its limits; the message begins with its name.
    """
    opened = [_File(get_modality(name), path) for name, path in files]
    for modality, path in opened:
        if not path.is_file():
            raise UsageError(
                f"--{modality.name} {path}: no such file",
                "there is nothing to read.",
                "check the path.",
            )
    values: dict[str, torch.Tensor] = {}
    if not opened:
        return values
    function = SampleFunction[_File, tuple["torch.Tensor", list[str]]](
        lambda file: read_file(*file), _refuse, lambda file: str(file.path)
    )
    with closing(SamplePool(function, _WORDS, limits or SampleLimits())) as pool:
        for (modality, _), (value, notes) in zip(opened, pool.map(opened), strict=True):
            values[modality.name] = value[None]
            for note in notes:
                _log.warning("%s", note)
    return values


def _refuse(file: _File, reason: str) -> tuple[torch.Tensor, list[str]]:
    raise SampleError(f"{file.path}: its decoder failed: {reason}")
