"""Decodes and transforms the media of samples, each with a random generator of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import MachineError, OneLLMError, SampleError
from onellm_dist.common.workers.sandbox import OutOfMemoryError, is_out_of_memory
from onellm_dist.data.order import derive_key
from onellm_dist.modalities import Modality
from onellm_dist.modalities.base import Part
from onellm_dist.modalities.library_faults import require_library


class LocatedMedium(NamedTuple):
    """One medium of a sample."""

    modality: str
    prefix: str
    """What the extensions of its parts begin with, where a sample lists its media; else empty."""
    extensions: dict[str, str]
    """Role of a part to extension."""
    spans: int = 1


class MediumReader:
    """Reads media as model input.

    Args:
        modalities: name to modality.
        seed: the run's seed.
        augment: whether values are augmented.
    """

    def __init__(self, modalities: Mapping[str, Modality], seed: int, *, augment: bool) -> None:
        self._modalities = modalities
        self._seed = seed
        self._augment = augment

    def build_rng(self, sample_id: str, medium: LocatedMedium) -> np.random.Generator:
        """Seed by run, sample, epoch and medium; never by worker, rank or earlier reads."""
        name = f"{sample_id} {medium.prefix}" if medium.prefix else sample_id
        key = derive_key("augment", self._seed, name, medium.modality)
        return np.random.Generator(np.random.PCG64(key))

    def read(
        self,
        sample_id: str,
        medium: LocatedMedium,
        parts: Mapping[str, Part],
        meta: Mapping[str, Any],
        rng: np.random.Generator,
    ) -> list[torch.Tensor]:
        """Read the spans of one medium: [*value_shape] each.

        Args:
            sample_id: the sample's id, for messages.
            medium: the medium.
            parts: the sample's parts by extension.
            meta: what its `.json` says of the medium.
            rng: the medium's generator.

        Raises:
            SampleError: it cannot be decoded.
            MachineError: the machine failed, not the sample.
            OneLLMError: the modality's code is at fault.
        """
        modality = self._modalities[medium.modality]
        prefix = f"{medium.prefix}." if medium.prefix else ""
        own = {
            role: replace(parts[e], extension=e.removeprefix(prefix)) if prefix else parts[e]
            for role, e in medium.extensions.items()
        }
        with translate_errors(modality, sample_id):
            train = self._augment
            if medium.spans == 1:
                raw = modality.decode(own, meta)
                values = [modality.make_loader_value(raw, train=train, rng=rng)]
            else:
                values = modality.read_spans(
                    own, meta, spans=medium.spans, train=train, rng=rng, for_loader=True
                )
        if len(values) != medium.spans:
            raise OneLLMError(
                f"sample {sample_id}: modality {modality.name} returned "
                f"{format_count(len(values), 'value')} for {format_count(medium.spans, 'span')}",
                f"this is a fault of {type(modality).__module__}, not of the data.",
                "report it to whoever made that modality, with the sample's id.",
            )
        for value in values:
            _check_value(modality, value, sample_id)
        return values


@contextlib.contextmanager
def translate_errors(modality: Modality, sample_id: str) -> Iterator[None]:
    """Turn a decoder's unexpected exception into a SampleError: the file is bad.

    Lack of memory and disk errors are the machine's fault and become a MachineError. A
    StopIteration must not escape: whoever iterates over batches would take it for the end.
    """
    try:
        yield
    except OneLLMError:
        raise
    except (MemoryError, OSError) as error:
        raise (OutOfMemoryError if is_out_of_memory(error) else MachineError)(
            f"sample {sample_id}, {modality.name}: {type(error).__name__}: {error}",
            "the machine failed, not the sample, so the sample is not skipped.",
            "check the node's memory, its limit of open files and its disks, and restart.",
        ) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemoryError(
                f"sample {sample_id}, {modality.name}: {error}",
                "the machine failed, not the sample, so the sample is not skipped.",
                "use fewer loader processes (data.workers).",
            ) from error
        require_library(error)
        raise SampleError(
            f"unreadable {modality.name}: {type(error).__name__}: {error}",
            "it cannot be decoded.",
        ) from error


def _check_value(modality: Modality, value: torch.Tensor, sample_id: str) -> None:
    shape = tuple(modality.value_shape)
    if tuple(value.shape) != shape or value.dtype != modality.loader_dtype:
        raise OneLLMError(
            f"sample {sample_id}: modality {modality.name} returned {tuple(value.shape)} "
            f"{value.dtype} instead of {shape} {modality.loader_dtype}",
            "this is a fault of the program, not of the data.",
            "report it with the sample's id.",
        )
