"""Answers of a group of ranks that hold one model together, in lockstep.

The first rank leads: it reads, asks and writes as a rank alone does, and gives the others each
batch of prompts. All ranks run the batch, and take the tokens that the first one chooses: rounding
may differ between devices, and rows must end alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed import distributed_c10d

from onellm_dist.common.error_text import get_first_line
from onellm_dist.common.errors import OneLLMError
from onellm_dist.evaluation.question_format import QuestionFormat
from onellm_dist.model.generation.batched import (
    BatchStatistics,
    Continuation,
    MediaCache,
    Prompt,
    generate_batch,
)
from onellm_dist.model.generation.sampling import RowSampling, choose_tokens

LEADER = 0
HOSTS_TIMEOUT = timedelta(hours=3)
"""How long the other ranks wait for the first, which reads media between batches. The end of its
process they see at once, as its connections are closed; not that of its node."""


def _set_timeout(group: Any, timeout: timedelta) -> None:
    """Let the collectives of a group wait so long."""
    change = getattr(distributed_c10d, "set_timeout", None)  # torch 2.15 renamed it
    (change or distributed_c10d._set_pg_timeout)(timeout, group)


@dataclass(frozen=True)
class _Batch:
    """What all ranks answer next."""

    prompts: list[Prompt]
    starts_anew: bool
    """Whether the media that are kept are dropped first."""
    reuses_media: bool


@dataclass(frozen=True)
class _End:
    """No batch follows."""

    failure: str | None
    """What went wrong on the first rank; None: everything is answered."""
    exit_code: int


class GroupGeneration:
    """`generate_batch` on all ranks of the default process group at once.

    Args:
        model: the model.
        run: runs a function that calls the model.
        form: how questions are asked; the same on all ranks.
        batch: prompts that are answered together; the same on all ranks.
    """

    def __init__(
        self,
        model: Any,
        run: Callable[[Callable[[], Any]], Any],
        form: QuestionFormat,
        batch: int,
    ) -> None:
        self._model = model
        self._run = run
        self._form = form
        self._batch = batch
        # Prompts and tokens are on the host: NCCL would take them by way of the device, and does
        # not see that another rank is gone.
        self._hosts: Any = dist.new_group(backend="gloo")  # made within the usual time
        _set_timeout(self._hosts, HOSTS_TIMEOUT)
        self._asked_cache: MediaCache | None = None
        self._cache: MediaCache | None = None
        self._is_in_batch = False
        self.is_leader = dist.get_rank() == LEADER
        """Whether this rank asks, and the others follow."""

    def generate(
        self,
        model: Any,
        prompts: Sequence[Prompt],
        *,
        media_cache: MediaCache | None,
        statistics: BatchStatistics,
        **_: Any,
    ) -> list[Continuation]:
        """Answer prompts as `generate_batch` does, on the first rank.

        Args:
            model: the model of this group.
            prompts: the prompts.
            media_cache: another one than before lets all ranks begin with an empty one.
            statistics: added to.

        Raises:
            OneLLMError: another rank of the group is gone.
        """
        starts_anew = media_cache is not self._asked_cache
        self._asked_cache = media_cache
        batch = _Batch(list(prompts), starts_anew, media_cache is not None)
        self._is_in_batch = True
        self._in_step(partial(self._send, batch))
        found: list[Continuation] = self._in_step(partial(self._answer, batch, statistics))
        self._is_in_batch = False
        return found

    def follow(self) -> int:
        """Run what the first rank asks, until it ends.

        Returns:
            Number of batches.

        Raises:
            OneLLMError: the first rank failed, or another rank is gone.
        """
        count = 0
        while isinstance(order := self._in_step(self._receive), _Batch):
            self._in_step(partial(self._answer, order, BatchStatistics()))
            count += 1
        if order.failure is not None:
            error = OneLLMError(
                f"the first rank of the group ended: {order.failure}",
                "it asks what all of its ranks answer.",
                "see its own message.",
            )
            error.exit_code = order.exit_code
            raise error
        return count

    def end(self, error: BaseException | None = None) -> None:
        """Let the other ranks end; with an error, as this rank does.

        Inside a batch the others wait in the model, where no message reaches them: they see that
        this rank is gone once it has left.
        """
        if self._is_in_batch:
            return
        failure = None if error is None else get_first_line(error)
        try:
            self._send(_End(failure, getattr(error, "exit_code", 1)))
        except RuntimeError:  # they are gone already
            if error is None:
                raise

    def _answer(self, batch: _Batch, statistics: BatchStatistics) -> list[Continuation]:
        if batch.starts_anew:
            self._cache = MediaCache() if batch.reuses_media else None
        found: list[Continuation] = self._run(
            lambda: generate_batch(
                self._model,
                batch.prompts,
                end_ids=self._form.end_ids,
                stop=self._form.stop,
                batch=self._batch,
                media_cache=self._cache,
                statistics=statistics,
                choose=self._choose,
            )
        )
        return found

    def _choose(self, logits: torch.Tensor, rows: Sequence[RowSampling]) -> list[int]:
        """The tokens that the first rank chooses."""
        chosen = choose_tokens(logits, rows) if self.is_leader else [0] * len(rows)
        taken = torch.tensor(chosen)
        dist.broadcast(taken, group_src=LEADER, group=self._hosts)
        tokens: list[int] = taken.tolist()
        return tokens

    def _send(self, order: _Batch | _End) -> None:
        dist.broadcast_object_list([order], group_src=LEADER, group=self._hosts)

    def _receive(self) -> Any:
        box: list[Any] = [None]
        dist.broadcast_object_list(box, group_src=LEADER, group=self._hosts)
        return box[0]

    def _in_step(self, call: Callable[[], Any]) -> Any:
        """Run something that all ranks do at once.

        Raises:
            OneLLMError: one of them is gone.
        """
        try:
            return call()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise OneLLMError(
                "this rank of the group or another one is gone or failed "
                f"({get_first_line(error)})",
                "the ranks of a group hold one model together.",
                "what was answered is on the disk; see the messages of the other ranks, and start "
                "again.",
            ) from error
