"""A copy of this rank's trainable state in host memory, which a checkpoint is written from while training goes on."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

import torch

from onellm_dist.train.checkpoint.folder import tensor_name
from onellm_dist.train.engine.base import LocalRange


class HostCopy:
    """Memory for the copy, made once and kept for as long as the run lives; page-locked beside a GPU.

    It takes 12 bytes a trainable element, over the ranks. (`pin_memory` would take up to twice that: torch 2.15 rounds each such tensor up
    to a power of two. One piece of ordinary memory is registered instead.)
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._tried = False
        self._release: weakref.finalize[[int], HostCopy] | None = None

    def take(
        self, ranges: Sequence[LocalRange], state_keys: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Name in the file -> [length] fp32, valid until the next call."""
        taken: dict[str, torch.Tensor] = {}
        memory, at, on_gpu = self._of(len(state_keys) * sum(own.length for own in ranges)), 0, False
        for own in ranges:
            for key in state_keys:
                values = own.read(key).detach()
                if values.is_cuda and not on_gpu:
                    on_gpu = True
                    self._lock()
                copy = memory[at : at + own.length]
                taken[tensor_name(own.name, own.start, key)] = copy.copy_(
                    values, non_blocking=on_gpu
                )
                at += own.length
        if on_gpu:
            torch.cuda.synchronize()
        return taken

    def _of(self, size: int) -> torch.Tensor:
        if len(self._memory) != size:
            if self._release is not None:
                self._release()
            self._tried, self._release = False, None
            self._memory = torch.empty(size, dtype=torch.float32)
        return self._memory

    def _lock(self) -> None:
        """Page-lock the memory; where the system does not allow it, copies are only slower."""
        if self._tried:
            return
        self._tried = True
        code = int(
            torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.nbytes, 0)
        )
        if code:
            warnings.warn(
                f"checkpoint copies go through pageable memory: cudaHostRegister failed with code {code}",
                stacklevel=2,
            )
        else:
            self._release = weakref.finalize(self, _unlock, self._memory.data_ptr())
            self._release.atexit = False


def live_state(ranges: Sequence[LocalRange], state_keys: Sequence[str]) -> dict[str, torch.Tensor]:
    """Name in the file -> [length] fp32: the state itself, where the engine keeps it. Nothing may step while it is read."""
    return {
        tensor_name(own.name, own.start, key): own.read(key).detach()
        for own in ranges
        for key in state_keys
    }


def _unlock(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
