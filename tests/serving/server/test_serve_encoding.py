"""Media of requests that wait are encoded while others are answered, and each gets its answer."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from engine_desk import MODEL, SHORT, Desk, compute_text, make_prompt

from onellm_dist.model.generation.media_cache import MediaCache, Medium
from onellm_dist.model.generation.rows import Prompt
from onellm_dist.serving.server import engine as engine_module
from onellm_dist.serving.server.errors import RequestError
from onellm_dist.serving.server.jobs import Job, JobQueue


def test_media_of_waiting_requests_are_encoded_together_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = {"a": make_prompt(1), "b": make_prompt(2, 1), "c": make_prompt(2), "d": SHORT}
    expected = {name: compute_text(prompt) for name, prompt in prompts.items()}
    assert len(set(expected.values())) == len(expected)
    encoded: list[int] = []
    original = MODEL.encode

    def encode(values: Any, numbers: Any) -> Any:
        encoded.append(sum(map(len, values.values())))
        return original(values, numbers)

    desk = Desk()
    for name, prompt in prompts.items():
        desk.ask(name, prompt)
    monkeypatch.setattr(MODEL, "encode", encode)
    desk.finish(len(prompts))
    assert encoded == [2]
    assert {name: desk.get_text(name) for name in prompts} == expected


def test_media_that_leave_the_cache_before_their_answers_begin_are_encoded_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = {"a": make_prompt(1), "b": make_prompt(2, 1)}
    expected = {name: compute_text(prompt) for name, prompt in prompts.items()}
    encoded: list[int] = []
    original = MODEL.encode

    def encode(values: Any, numbers: Any) -> Any:
        encoded.append(sum(map(len, values.values())))
        return original(values, numbers)

    monkeypatch.setattr(engine_module, "MediaCache", lambda: MediaCache(max_bytes=1))
    desk = Desk()
    for name, prompt in prompts.items():
        desk.ask(name, prompt)
    monkeypatch.setattr(MODEL, "encode", encode)
    desk.finish(2)
    assert encoded == [2, 2]
    assert {name: desk.get_text(name) for name in prompts} == expected


@pytest.mark.parametrize("encoded", [True, False], ids=["encoded", "encoding failed"])
def test_media_keep_requests_apart_unless_they_are_encoded(encoded: bool) -> None:
    desk = Desk()
    prompt = make_prompt(*[0] * 9)  # two of them have more spans than are encoded at once
    jobs = [desk.ask(name, prompt) for name in ("a", "b")]
    for job in jobs:  # as the encoder does
        job.is_encoded = encoded
    desk.queue.release(jobs)
    desk.finish(2)
    assert desk.get_text("a") == desk.get_text("b") == compute_text(prompt)
    metrics = desk.read_metrics()
    together = metrics["onellm_batch_size_sum"] == 2 and metrics["onellm_batch_size_count"] == 1
    assert together == encoded


def test_the_time_of_a_request_may_end_while_its_media_are_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk, original = Desk(), MODEL.encode
    job = desk.ask("late", make_prompt(3))

    def encode(*args: Any) -> Any:
        job.deadline = 0.0
        return original(*args)

    monkeypatch.setattr(MODEL, "encode", encode)
    desk.ask("short", SHORT)
    desk.finish(2)
    assert desk.get_error("late").status == 504 and desk.get_text("late") == ""
    assert desk.get_text("short") == compute_text(SHORT)
    assert desk.read_metrics()["onellm_running_requests"] == 0


def test_a_server_that_ends_answers_requests_whose_media_are_being_encoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    desk, original, prompts = Desk(), MODEL.encode, (make_prompt(2), make_prompt(3))
    expected = [compute_text(prompt) for prompt in prompts]
    begun, go = threading.Event(), threading.Event()

    def encode(*args: Any) -> Any:
        begun.set()
        assert go.wait(20)
        return original(*args)

    monkeypatch.setattr(MODEL, "encode", encode)
    desk.ask("first", prompts[0])
    desk.engine.start()
    assert begun.wait(20)
    desk.ask("second", prompts[1])  # held behind it
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(desk.engine.close)
        time.sleep(0.2)
        assert not closing.done()
        go.set()
        closing.result(20)
    assert [desk.get_text(name) for name in ("first", "second")] == expected
    assert not desk.engine.is_alive


def test_a_medium_that_cannot_be_encoded_fails_its_request_alone() -> None:
    good = make_prompt(3)
    expected = compute_text(good)
    wrong = Medium("image", torch.zeros(3, 5, 5), "wrong")
    unknown = Medium("smell", torch.zeros(3), "unknown")
    desk = Desk()
    desk.ask("good", good)
    desk.ask("wrong", Prompt([1, 60], [wrong], max_new_tokens=5))
    desk.ask("unknown", Prompt([1, 60], [unknown], max_new_tokens=5))
    desk.ask("again", good)
    desk.finish(4)
    assert desk.get_text("good") == desk.get_text("again") == expected
    errors = {name: event for name, event in desk.log if isinstance(event, RequestError)}
    assert errors.keys() == {"wrong", "unknown"}
    assert "smell" in errors["unknown"].message


def test_the_queue_holds_media_until_they_are_encoded_and_not_too_many_ahead() -> None:
    queue = JobQueue(20)
    queue.holds_media = True
    jobs = []
    for spans in (0, 9, 9, 20, 40, 1):
        media = [Medium("image", torch.zeros(1), str(i)) for i in range(spans)]
        prompt = Prompt([1] * 9, media, max_new_tokens=3)
        jobs.append(Job(prompt, (), None, time.monotonic() + 60, print))
        queue.put(jobs[-1])
    assert queue.take(9) == jobs[:1]
    for first in (1, 2, 3, 4):  # two of them together would be more than 16 spans
        held = queue.wait_for_media()
        assert held == jobs[first : first + 1]
        queue.release(held)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(queue.wait_for_media)
        time.sleep(0.2)
        assert not waiting.done()  # 78 spans are ahead
        assert len(queue.take(9)) == 4
        assert waiting.result(5) == jobs[5:]
    queue.discard(jobs[5])  # its client left
    queue.release(jobs[5:])
    queue.close()
    assert queue.take(9) == [] and queue.wait_for_media() == []
