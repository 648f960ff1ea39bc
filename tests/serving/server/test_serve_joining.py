"""Requests that come while others are being answered join them, and each gets its own answer."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from engine_desk import BESIDE, LONG, SHORT, Desk, compute_text

from onellm_dist.model.generation.media_cache import Medium
from onellm_dist.model.generation.rows import Prompt
from onellm_dist.serving.server import jobs as jobs_module
from onellm_dist.serving.server.errors import RequestError
from onellm_dist.serving.server.jobs import Ending, Job, JobQueue, Piece


def test_a_request_does_not_wait_for_the_answers_under_way() -> None:
    desk = Desk()

    def ask_more() -> None:
        desk.ask("short", SHORT)

    desk.ask("long", LONG, ask_more)
    desk.finish(2)
    assert desk.find_ends() == ["short", "long"]
    assert desk.get_text("long") == compute_text(LONG)
    assert desk.get_text("short") == compute_text(SHORT)
    metrics = desk.read_metrics()
    assert metrics["onellm_batch_size_sum"] == 3 and metrics["onellm_batch_size_count"] == 2
    assert metrics["onellm_running_requests"] == 0
    assert metrics["onellm_completion_tokens_total"] == 64


def test_answers_that_end_with_their_first_token_are_counted_in_the_batch() -> None:
    desk, one = Desk(), Prompt([1, 50, 51], max_new_tokens=1)
    desk.ask("long", LONG, lambda: desk.ask("one", one))
    desk.finish(2)
    metrics = desk.read_metrics()
    assert metrics["onellm_batch_size_sum"] == 3 and metrics["onellm_batch_size_count"] == 2


def test_answers_side_by_side_have_their_own_logprobs() -> None:
    desk = Desk()
    desk.ask("long", LONG, lambda: desk.ask("short", SHORT, top_logprobs=2), top_logprobs=0)
    desk.finish(2)
    assert desk.find_ends() == ["short", "long"]
    for name, prompt, top in (("long", LONG, 0), ("short", SHORT, 2)):
        alone = Desk()
        alone.ask(name, prompt, top_logprobs=top)
        alone.finish(1)
        found, wanted = desk.get_records(name), alone.get_records(name)
        assert [one.token for one in found] == [one.token for one in wanted]
        assert len(found) == prompt.max_new_tokens
        for own, other in zip(found, wanted, strict=True):
            assert own.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [i for i, _ in own.top] == [i for i, _ in other.top] and len(own.top) == top


def test_the_time_of_one_answer_may_end_beside_others() -> None:
    desk = Desk()
    late: list[Job] = []

    def end_time() -> None:
        late[0].deadline = 0.0

    desk.ask("long", LONG, lambda: late.append(desk.ask("late", BESIDE, end_time)))
    desk.finish(2)
    assert desk.find_ends() == ["late", "long"] and desk.get_error("late").status == 504
    assert compute_text(BESIDE).startswith(desk.get_text("late")) and desk.get_text("late")
    assert desk.get_text("long") == compute_text(LONG)
    assert desk.read_metrics()["onellm_running_requests"] == 0


def test_a_request_whose_time_ends_as_it_begins_gets_its_error() -> None:
    desk, asked = Desk(), []

    class EndingJob(Job):
        @property
        def is_late(self) -> bool:
            asked.append(self)
            return len(asked) == 2

    def send(event: Any) -> None:
        desk.log.append(("late", event))

    desk.queue.put(EndingJob(SHORT, (), None, time.monotonic() + 60, send))
    desk.finish(1)
    assert desk.get_error("late").status == 504


def test_a_fault_in_one_answer_ends_that_answer_alone() -> None:
    desk = Desk()

    def fail(*_: Any) -> None:
        raise RuntimeError("no room for this text")

    def ask_more() -> None:
        desk.ask("bad", BESIDE, fail)
        for seconds in (60, -1):  # one that not even an error reaches, answered and late
            desk.queue.put(Job(BESIDE, (), None, time.monotonic() + seconds, fail))

    desk.ask("long", LONG, ask_more)
    desk.finish(2)
    assert desk.find_ends() == ["bad", "long"]
    error = desk.get_error("bad")
    assert error.status == 500 and "room" not in error.message
    assert desk.get_text("long") == compute_text(LONG)
    assert desk.read_metrics()["onellm_running_requests"] == 0


def test_logits_that_are_no_numbers_end_the_answer_that_is_drawn_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from onellm_dist.model.generation import running_batch
    from onellm_dist.model.llm import cached as llm_cached

    original = llm_cached.decode

    def decode(*args: Any) -> Any:
        logits = original(*args)
        logits[1:] = torch.nan
        return logits

    monkeypatch.setattr(running_batch, "decode", decode)
    desk, drawn = Desk(), Prompt([1, 50, 51], max_new_tokens=30, temperature=1.0)
    desk.ask("long", LONG, lambda: desk.ask("drawn", drawn))
    desk.finish(2)
    assert desk.find_ends() == ["drawn", "long"]
    error = desk.get_error("drawn")
    assert error.status == 500 and "logits that are not numbers" in error.message
    monkeypatch.undo()
    assert desk.get_text("long") == compute_text(LONG)


def test_a_request_that_cannot_be_answered_fails_alone_beside_others() -> None:
    desk = Desk()

    def ask_more() -> None:
        desk.ask("bad", Prompt([1, 10**6], max_new_tokens=9))
        desk.ask("gone", SHORT).cancel()
        desk.ask("short", SHORT)

    desk.ask("long", LONG, ask_more)
    desk.finish(3)
    assert sorted(desk.find_ends()) == ["bad", "long", "short"]
    (error,) = [event for name, event in desk.log if name == "bad"]
    assert isinstance(error, RequestError) and error.status == 400
    assert desk.get_text("long") == compute_text(LONG)
    assert desk.get_text("short") == compute_text(SHORT)
    assert desk.read_metrics()["onellm_running_requests"] == 0


def test_a_step_that_fails_ends_its_answers_and_no_later_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from onellm_dist.model.generation import running_batch
    from onellm_dist.model.llm import cached as llm_cached

    calls = []
    original = llm_cached.decode

    def decode(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("a kernel failed")
        return original(*args)

    monkeypatch.setattr(running_batch, "decode", decode)
    desk = Desk(batch=2)
    for name in ("a", "b", "c"):
        desk.ask(name, LONG if name != "c" else SHORT)
    desk.finish(3)
    ends = {name: event for name, event in desk.log if not isinstance(event, Piece)}
    assert ends["a"].status == ends["b"].status == 500
    assert "kernel" not in ends["a"].message
    assert isinstance(ends["c"], Ending) and desk.get_text("c") == compute_text(SHORT)
    assert desk.read_metrics()["onellm_running_requests"] == 0


def test_the_queue_lets_nobody_overtake_the_one_that_waited_longest() -> None:
    queue = JobQueue(9)
    for adapter, tokens in (("a", 9), ("b", 5), ("a", 5), ("a", 8)):
        prompt = Prompt([1] * tokens, max_new_tokens=3)
        queue.put(Job(prompt, (), None, time.monotonic() + 60, print, adapter))

    def count(jobs: list[Job]) -> list[int]:
        return [len(job.prompt.ids) for job in jobs]

    def fits(jobs: Any) -> bool:
        return sum(len(job.prompt.ids) for job in jobs) <= 14

    assert queue.take_more(4, "a", lambda _: False) == []
    assert queue.take_more(4, "b", fits) == []
    assert count(queue.take_more(1, "a", fits)) == [9]
    assert queue.take_more(4, "a", fits) == []  # that of b waits longer
    assert count(queue.take(4, fits)) == [5]
    assert count(queue.take_more(4, "a", fits)) == [5, 8]
    assert queue.take_more(4, "a", fits) == []


def test_requests_join_past_one_for_which_there_is_no_room() -> None:
    queue = JobQueue(9)
    medium, jobs = Medium("image", torch.zeros(1)), []
    for media in (9, 9, 0, 0):
        prompt = Prompt([1] * 9, [medium] * media, max_new_tokens=3)
        jobs.append(Job(prompt, (), None, time.monotonic() + 60, print))
        queue.put(jobs[-1])

    def fits(some: Any) -> bool:
        return sum(len(job.prompt.media) for job in some) <= 16

    assert queue.take(3, fits) == [jobs[0], jobs[2], jobs[3]]
    assert queue.take(3, fits) == [jobs[1]]


def test_the_queue_goes_on_where_the_only_client_leaves_while_others_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs_module, "JOIN_WAIT_S", 0.3)
    queue = JobQueue(9)
    jobs = [Job(SHORT, (), None, time.monotonic() + 60, print) for _ in range(2)]
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(queue.take, 4)
        queue.put(jobs[0])
        time.sleep(0.05)
        queue.discard(jobs[0])
        time.sleep(0.5)
        assert not taking.done()
        queue.put(jobs[1])
        assert taking.result(5) == jobs[1:]
