"""Host memory for a copy of this rank's trainable state, from which a checkpoint is written."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

import torch

from onellm_dist.train.checkpoint.folder import make_tensor_name
from onellm_dist.train.engine.base import LocalRange


class StagingBuffer:
    """The state of this rank, copied to host memory so that training continues meanwhile.

    The memory is allocated once and kept for as long as the run lives; it is page-locked beside a
    GPU. Over all ranks it takes 4 bytes per state key and trainable element (12 with AdamW).
    `pin_memory` would take up to twice that: torch 2.15 rounds each such tensor up to a power of
    two. One piece of ordinary memory is registered instead.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._is_lock_tried = False
        self._release: weakref.finalize[[int], StagingBuffer] | None = None

    def load(
        self, ranges: Sequence[LocalRange], state_keys: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        """Copy the state of `ranges` into the buffer.

        Returns:
            Name in the checkpoint's file to [length] fp32, valid until the next call.
        """
        loaded: dict[str, torch.Tensor] = {}
        memory = self._get_memory(len(state_keys) * sum(own.length for own in ranges))
        offset = 0
        on_gpu = False
        for own in ranges:
            for key in state_keys:
                values = own.read(key).detach()
                if values.is_cuda and not on_gpu:
                    on_gpu = True
                    self._lock_pages()
                copy = memory[offset : offset + own.length]
                copy.copy_(values, non_blocking=on_gpu)
                loaded[make_tensor_name(own.name, own.start, key)] = copy
                offset += own.length
        if on_gpu:
            torch.cuda.synchronize()
        return loaded

    def _get_memory(self, size: int) -> torch.Tensor:
        if len(self._memory) != size:
            if self._release is not None:
                self._release()
            self._release = None
            self._is_lock_tried = False
            self._memory = torch.empty(size, dtype=torch.float32)
        return self._memory

    def _lock_pages(self) -> None:
        """Page-lock the memory; where the system does not allow it, copies are only slower."""
        if self._is_lock_tried:
            return
        self._is_lock_tried = True
        code = int(
            torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), self._memory.nbytes, 0)
        )
        if code:
            warnings.warn(
                "checkpoint copies go through pageable memory: cudaHostRegister failed with code "
                f"{code}",
                stacklevel=2,
            )
        else:
            self._release = weakref.finalize(self, _unlock_pages, self._memory.data_ptr())
            self._release.atexit = False


def read_live_state(
    ranges: Sequence[LocalRange], state_keys: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The state itself, where the engine keeps it; nothing may step while it is read.

    Returns:
        Name in the checkpoint's file to [length] fp32.
    """
    return {
        make_tensor_name(own.name, own.start, key): own.read(key).detach()
        for own in ranges
        for key in state_keys
    }


def _unlock_pages(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
