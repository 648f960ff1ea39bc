"""The ranks of a run: the process group, and the few messages that training sends itself."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import distributed as torch_dist
from torch.distributed import distributed_c10d

from onellm_dist.common.counts import format_count
from onellm_dist.common.error_text import get_first_line
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.logging import get_logger
from onellm_dist.common.resources import name_processors
from onellm_dist.config.schema import StabilitySection
from onellm_dist.launch.ranks import Ranks
from onellm_dist.train.rendezvous import count_ranks_here, meet, restrict_to_loopback

T = TypeVar("T")
log = get_logger(__name__)
NCCL_SHARED_MEMORY = 256 << 20
"""Bytes of `/dev/shm` below which a warning is logged: NCCL takes about 10 MB per pair of GPUs."""
SLACK_MINUTES = 5.0
"""A collective gives up this much later than the watchdog, so that a hang is reported by the
watchdog, with stacks, and not by a timeout."""
GROUP_TIMEOUTS = ("default_pg_timeout", "default_pg_nccl_timeout")
"""torch's default timeouts of new process groups (2.15)."""


@dataclass(frozen=True)
class Distributed:
    """This rank among all ranks, and its device."""

    rank: int
    world_size: int
    local_world_size: int
    """Ranks of this node."""
    device: torch.device

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        torch_dist.barrier()

    def sum(self, tensor: torch.Tensor) -> None:
        """Add `tensor` over the ranks, in place."""
        torch_dist.all_reduce(tensor)

    def gather(self, value: T) -> list[T]:
        """`value` of every rank, by rank, on every rank."""
        found: list[T | None] = [None] * self.world_size
        torch_dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]  # every element was filled in

    def broadcast(self, value: T) -> T:
        """Rank 0's `value`, on every rank."""
        box = [value]
        torch_dist.broadcast_object_list(box, src=0)
        return box[0]

    def ask_rank_zero(self, call: Callable[[], T]) -> T:
        """What rank 0's `call` returns or raises, on every rank; the others do not call.

        Raises:
            OneLLMError: as rank 0 raised it. Rank 0 raises an error of any other kind as it is, and
                the others raise one that names it: they would wait for an answer otherwise.
        """
        answer: T | None = None
        problem: OneLLMError | None = None
        if self.is_rank_zero:
            try:
                answer = call()
            except OneLLMError as error:
                problem = error
            except Exception as error:
                self.broadcast((self._describe(error), None))
                raise
        problem, answer = self.broadcast((problem, answer))
        if problem is not None:
            raise problem
        return answer  # type: ignore[return-value]  # rank 0's call returned it

    def call_together(self, call: Callable[[], T]) -> T:
        """What `call` returns on this rank, if it raises on none; it may not wait for other ranks.

        Raises:
            OneLLMError: as the first rank that failed raised it, on every rank. An error of any
                other kind is named to the others, as by `ask_rank_zero`.
        """
        try:
            answer = call()
        except OneLLMError as error:
            self.gather(error)
            raise
        except Exception as error:
            self.gather(self._describe(error))
            raise
        problem = next(filter(None, self.gather(cast("OneLLMError | None", None))), None)
        if problem is not None:
            raise problem
        return answer

    def _describe(self, error: Exception) -> OneLLMError:
        """What the other ranks raise: the error's own class may not be pickled."""
        return OneLLMError(
            f"rank {self.rank} failed: {type(error).__name__}: {get_first_line(error)}",
            "the others cannot continue without it.",
            "see what that rank says.",
        )


@contextmanager
def process_group(ranks: Ranks, stability: StabilitySection | None = None) -> Iterator[Distributed]:
    """Join the other ranks for the time of the context.

    A process group that exists already is used, and stays. Otherwise a group is made here and
    destroyed at the end, and environment variables, torch's default timeouts and its number of
    threads return to what they were.

    Args:
        ranks: this process's place in the run.
        stability: collectives wait longer than any limit of this section.

    Raises:
        UsageError: this process sees several GPUs, but fewer than the node has ranks.
    """
    environment = dict(os.environ)
    timeouts = {name: getattr(distributed_c10d, name) for name in GROUP_TIMEOUTS}
    threads = torch.get_num_threads()
    own = not torch_dist.is_initialized()
    try:
        yield join(ranks, stability)
    finally:
        if own and torch_dist.is_initialized():
            torch_dist.destroy_process_group()
        for name, value in timeouts.items():
            setattr(distributed_c10d, name, value)
        torch.set_num_threads(threads)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


def join(ranks: Ranks, stability: StabilitySection | None = None) -> Distributed:
    """Select this process's device and join the other ranks; the ranks of a node share its cores.

    Args:
        ranks: this process's place in the run.
        stability: collectives, also those of groups that the engines make, wait longer than any
            limit of this section.

    Raises:
        UsageError: this process sees several GPUs, but fewer than the node has ranks.
        OneLLMError: a rank did not come (see `rendezvous.meet`).
    """
    ranks.export()
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        gpu = select_gpu(ranks.local_rank, ranks.local_world_size, torch.cuda.device_count())
        device = torch.device("cuda", gpu)
        # DeepSpeed 0.19 uses the GPU of this number, and uses the variable for nothing else here.
        os.environ["LOCAL_RANK"] = str(device.index)
        torch.cuda.set_device(device)
    timeout = collective_timeout(stability or StabilitySection())
    # torch 2.15 gives a group that is made without a timeout its own default: 10 minutes with
    # NCCL, less than stability.hang_minutes.
    for name in GROUP_TIMEOUTS:
        setattr(distributed_c10d, name, timeout)
    local_world_size = ranks.local_world_size
    if not torch_dist.is_initialized():
        if ranks.are_on_one_machine:
            os.environ.update(restrict_to_loopback())
        if cuda and ranks.local_world_size > 1:
            warn_about_shared_memory(Path("/dev/shm"))
        store = meet(ranks, timeout)
        if not ranks.local_size_is_known:
            local_world_size = count_ranks_here(store, ranks)
            os.environ["LOCAL_WORLD_SIZE"] = str(local_world_size)
        torch_dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timeout,
            device_id=device if cuda else None,
        )
    # torchrun sets OMP_NUM_THREADS=1; deepspeed leaves it unset (every rank then uses all cores).
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_per_rank(local_world_size))
    return Distributed(ranks.rank, ranks.world_size, local_world_size, device)


def warn_about_shared_memory(folder: Path) -> None:
    """Warn where NCCL will not find room to connect the GPUs of this node.

    Loader workers need none of it.

    Args:
        folder: `/dev/shm`.
    """
    try:
        free = shutil.disk_usage(folder).free if os.access(folder, os.W_OK) else 0
    except OSError:
        free = 0
    if free < NCCL_SHARED_MEMORY:
        log.warning(
            "%s has %.0f MiB free: NCCL connects the GPUs of a node through it and may fail. Give "
            "the container more (--shm-size, --ipc=host), or set NCCL_SHM_DISABLE=1.",
            folder,
            free / (1 << 20),
        )


def leave() -> None:
    """Wait for the other ranks a last time and destroy the process group."""
    torch_dist.barrier()
    torch_dist.destroy_process_group()


def collective_timeout(stability: StabilitySection) -> timedelta:
    """How long a collective waits: longer than the watchdog in any phase."""
    limits = (
        stability.hang_minutes,
        stability.first_step_minutes,
        stability.checkpoint_minutes,
        stability.validation_minutes,
    )
    return timedelta(minutes=max(limits) + SLACK_MINUTES)


def select_gpu(local_rank: int, local_world_size: int, visible: int) -> int:
    """Index of this rank's GPU among those that its process sees.

    It is the rank's own, or the only one where each task sees one.

    Raises:
        UsageError: the process sees several, but fewer than the node has ranks.
    """
    if visible == 1:
        return 0
    if visible < local_world_size:
        raise UsageError(
            f"{format_count(local_world_size, 'rank')} on this node, and this process sees "
            f"{format_count(visible, 'GPU')}",
            "two ranks cannot share a GPU: NCCL refuses it.",
            f"start {format_count(visible, 'rank')} per node, or show each rank every GPU "
            "(--gpus-per-node) or its own alone (--gpus-per-task=1).",
        )
    return local_rank


def name_device(device: torch.device) -> str:
    """What a device calls itself: a GPU by its product name, processors by model and number."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return name_processors()


def threads_per_rank(local_world_size: int) -> int:
    """Cores that this process may use, shared evenly among the ranks of the node; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_world_size))
