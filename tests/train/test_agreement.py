"""What one rank does for all, or each for itself: its failure is that of every rank."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.train.distributed import Distributed

RANKS = 3


class Meeting:
    """What the ranks hand to each other; a rank that never comes breaks it."""

    def __init__(self) -> None:
        self.values: list[Any] = [None] * RANKS
        self.barrier = threading.Barrier(RANKS, timeout=20)


class ThreadRank(Distributed):
    """A rank that is a thread of this process."""

    meeting: Meeting

    def gather(self, value: Any) -> list[Any]:
        self.meeting.values[self.rank] = value
        self.meeting.barrier.wait()
        found = list(self.meeting.values)
        self.meeting.barrier.wait()
        return found

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


def run(each: Callable[[Distributed], Any]) -> list[Any]:
    """What `each` returns or raises, by rank."""
    meeting = Meeting()

    def act(rank: int) -> Any:
        dist = ThreadRank(rank, RANKS, RANKS, torch.device("cpu"))
        object.__setattr__(dist, "meeting", meeting)
        try:
            return each(dist)
        except Exception as error:
            return error

    with ThreadPoolExecutor(RANKS) as pool:
        return [*pool.map(act, range(RANKS))]


def test_rank_zero_answers_for_all() -> None:
    asked: list[int] = []

    def look(dist: Distributed) -> str:
        def call() -> str:
            asked.append(dist.rank)
            return "found"

        return dist.ask_rank_zero(call)

    assert run(look) == ["found"] * RANKS and asked == [0]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    "error",
    [UsageError("a", "b", "c"), OSError(28, "No space left"), ZeroDivisionError("no number")],
    ids=lambda error: type(error).__name__,
)
def test_the_failure_of_one_rank_is_that_of_all(error: Exception, failing: int) -> None:
    def act(dist: Distributed) -> str:
        def call() -> str:
            if dist.rank == failing:
                raise error
            return "done"

        return dist.call_together(call) if failing else dist.ask_rank_zero(call)

    found = run(act)
    assert found[failing] is error
    others = [each for rank, each in enumerate(found) if rank != failing]
    if isinstance(error, OneLLMError):
        assert [type(each) for each in others] == [UsageError] * 2
        assert {str(each) for each in others} == {"a\nb\nc"}
    else:
        named = f"rank {failing} failed: {type(error).__name__}: {error}"
        assert all(isinstance(each, OneLLMError) and each.what == named for each in others)


def test_what_all_can_do_each_has_done() -> None:
    assert run(lambda dist: dist.call_together(lambda: dist.rank)) == [0, 1, 2]
