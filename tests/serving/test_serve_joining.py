"""Requests that come while others are being answered join them, and each gets its own answer."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import served_model as served
import torch

from onellm_dist.model.batched_generation import generate_batch
from onellm_dist.model.generation_rows import Prompt
from onellm_dist.model.media_cache import Medium
from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.serving.server import jobs as jobs_module
from onellm_dist.serving.server.engine import AnswerEngine
from onellm_dist.serving.server.errors import RequestError
from onellm_dist.serving.server.jobs import Ending, Job, JobQueue, Piece
from onellm_dist.serving.server.metrics import ServerMetrics

MODEL = served.make_model()
TOKENIZER = load_toy_tokenizer()


class Desk:
    """An engine, and a log of what it sends."""

    def __init__(self, batch: int = 4) -> None:
        self.queue, self.metrics = JobQueue(20), ServerMetrics()
        self.engine = AnswerEngine(MODEL, TOKENIZER, [2], self.queue, self.metrics, batch)
        self.log: list[tuple[str, Any]] = []

    def ask(self, name: str, prompt: Prompt, then: Callable[[], None] | None = None) -> Job:
        """Put a request into the queue; with its first text, the engine's thread calls `then`."""

        def send(event: Any) -> None:
            is_first = all(logged != name for logged, _ in self.log)
            self.log.append((name, event))
            if is_first and then is not None:
                then()

        job = Job(prompt, (), None, time.monotonic() + 60, send)
        self.queue.put(job)
        return job

    def finish(self, answers: int) -> None:
        """Run the engine until so many requests have ended."""
        self.engine.start()
        end = time.monotonic() + 60
        while len(self.find_ends()) < answers:
            assert time.monotonic() < end
            time.sleep(0.01)
        self.engine.close()

    def find_ends(self) -> list[str]:
        return [name for name, event in list(self.log) if not isinstance(event, Piece)]

    def get_text(self, name: str) -> str:
        return "".join(e.text for n, e in self.log if n == name and isinstance(e, Piece))

    def read_metrics(self) -> dict[str, float]:
        lines = self.metrics.write().decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}


def compute_text(prompt: Prompt) -> str:
    (found,) = generate_batch(MODEL, [prompt], end_ids=[2])
    return str(TOKENIZER.decode(list(found.tokens), skip_special_tokens=True)).strip()


LONG = Prompt([1, 40, 41, 42, 43], max_new_tokens=60)
SHORT = Prompt([1, 50, 51], max_new_tokens=4)


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
    from onellm_dist.model import llm_cached, running_batch

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


def make_picture(seed: int) -> Medium:
    generator = torch.Generator().manual_seed(seed)
    return Medium("image", torch.randn(3, 224, 224, generator=generator), f"picture {seed}")


def make_prompt(*seeds: int) -> Prompt:
    """A prompt of its own for all pictures, so that each answer is."""
    media = [make_picture(seed) for seed in seeds]
    return Prompt([1, 60 + sum(seeds) * 7], media, max_new_tokens=5)


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


def test_the_queue_goes_on_where_the_only_client_leaves_while_others_are_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs_module, "LINGER", 0.3)
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
