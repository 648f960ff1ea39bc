"""From a file on disk to the model's input, for `onellm generate` and the processor."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onellm_dist.common.errors import OneLLMError, SampleError
from onellm_dist.common.workers.sandbox import decoding
from onellm_dist.modalities.base import Modality
from onellm_dist.modalities.io.damage import ASSUMED, collect_damage
from onellm_dist.modalities.library_faults import translate_errors

_log = logging.getLogger(__name__)


def read_file_value(modality: Modality, path: Path) -> torch.Tensor:
    """Read a file, and those that belong to it beside it, with the evaluation transform.

    The object in `<stem>.json` is read like a sample's `.json`. A warning says what is missing of a
    damaged file that is used all the same.

    Returns:
        [*value_shape] fp32.

    Raises:
        SampleError: it cannot be decoded; the message begins with its name.
        OneLLMError: the disk fails.
    """
    value, notes = read_file(modality, path)
    for note in notes:
        _log.warning("%s", note)
    return value


def read_file(modality: Modality, path: Path) -> tuple[torch.Tensor, list[str]]:
    """Read a file as `read_file_value` does, and return its warnings instead of logging them.

    Raises:
        SampleError: as of `read_file_value`.
        OneLLMError: as of `read_file_value`.
    """
    values, notes = read_file_spans(modality, path, 1)
    return values[0], notes


def read_file_spans(modality: Modality, path: Path, most: int) -> tuple[torch.Tensor, list[str]]:
    """Read a file as one or several spans, with the evaluation transform.

    Args:
        modality: its modality.
        path: the file.
        most: the most spans that it may take (`data.spans`).

    Returns:
        [spans, *value_shape] fp32, and its warnings.

    Raises:
        SampleError: as of `read_file_value`.
        OneLLMError: as of `read_file_value`.
    """
    try:
        parts = modality.read_parts(path)
        with collect_damage() as damage, decoding():
            meta = _read_sidecar_json(path, modality.name)
            rng = np.random.default_rng(0)
            with translate_errors(modality.name):
                size = modality.measure(parts) if most > 1 else None
                spans = 1 if size is None else modality.count_spans(size, most)
                if spans > 1:
                    values = modality.read_spans(parts, meta, spans=spans, train=False, rng=rng)
                else:
                    values = [modality.read_value(parts, meta, train=False, rng=rng)]
    except SampleError as error:
        message = error.what if str(path) in error.what else f"{path}: {error.what}"
        raise SampleError(message, error.why, error.do) from error
    except OSError as error:
        raise OneLLMError(
            f"{path}: {error.strerror or error}",
            "the file cannot be read.",
            "check its permissions and the disk.",
        ) from error
    return torch.stack(values), [
        f"{path}: {what}"
        if what.startswith(ASSUMED)
        else f"{path} is damaged, and is used as it is: {what}"
        for what in dict.fromkeys(damage)
    ]


def _read_sidecar_json(path: Path, modality: str) -> Mapping[str, Any]:
    """Return the object in `<stem>.json` beside a file, like a sample's `.json`; else nothing.

    Beside `<stem>_<modality>.png` (Omnidata's names), `<stem>.json` is read too.
    """
    stem = path.name.split(".", 1)[0]
    names = dict.fromkeys((stem, stem.removesuffix(f"_{modality}")))
    sidecar = next((p for n in names if (p := path.with_name(f"{n}.json")).is_file()), None)
    if sidecar is None:
        return {}
    try:
        meta = json.loads(sidecar.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SampleError(
            f"{sidecar}: not JSON: {error}",
            f"it describes {path.name}.",
            "fix it, or move it away.",
        ) from None
    return meta if isinstance(meta, dict) else {}
