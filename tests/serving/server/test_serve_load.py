"""Many clients of a real server process at once, by the openai client, and its end under load."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
import served_model as served

from onellm_dist.model import OneLLMProcessor
from onellm_dist.model.presets import load_toy_tokenizer

MODEL = served.make_model()
GRACE = 1.0
"""Seconds before the signal: what was sent earlier was accepted."""


@dataclass(frozen=True)
class Question:
    """A request, and the only right answer to it."""

    parts: tuple[Any, ...]
    text: str
    tokens: int
    answer: str


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    found = []
    for seed in range(8):
        media: dict[str, Any] = {
            0: {"imu": served.make_array((6, 400), seed=seed)},
            1: {"image": served.make_picture(seed)},
            2: {"fmri": served.make_array((15724,), seed=seed), "audio": served.make_sound(seed)},
            3: {},
        }[seed % 4]
        text = " ".join(["What", "is", "red", "left"][: 1 + seed % 4] * (1 + seed)) + "?"
        tokens = 6 + 4 * (seed % 7)
        parts = tuple(served.make_part(name, files) for name, files in media.items())
        answer = served.compute_answer(MODEL, text, media, tokens)
        found.append(Question(parts, text, tokens, answer))
    assert len({question.answer for question in found}) == len(found)  # the input decides
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "toy"
    MODEL.save_pretrained(folder)
    OneLLMProcessor(load_toy_tokenizer()).save_pretrained(folder)
    return folder


@contextmanager
def start_server(folder: Path, *options: str) -> Iterator[tuple[Any, str]]:
    """A server in a process of its own; yields it and its address."""
    command = [sys.executable, "-m", "onellm_dist.cli", "serve", str(folder), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith("serving "))
            yield process, line.split(" on ")[1].strip()
        finally:
            process.kill()


@dataclass
class Load:
    """Clients that ask one question after the other, until they are stopped."""

    address: str
    questions: list[Question]
    ended: threading.Event = field(default_factory=threading.Event)
    signalled: float = float("inf")
    """When the server was sent SIGTERM."""
    answered: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run_client(self, number: int) -> None:
        rng = random.Random(number)
        with openai.OpenAI(base_url=self.address, api_key="none", max_retries=0) as client:
            while not self.ended.is_set():
                question = rng.choice(self.questions)
                began = time.monotonic()
                try:
                    text = ask(client, question, stream=rng.random() < 0.5)
                except openai.APIConnectionError:  # nothing was answered, not even a head
                    assert began > self.signalled - GRACE, "an accepted request was lost"
                    return
                assert text == question.answer
                with self._lock:
                    self.answered += 1


def ask(client: openai.OpenAI, question: Question, *, stream: bool) -> str:
    """The answer; every answer that begins must be whole."""
    options: dict[str, Any] = {
        "model": "toy",
        "messages": served.make_messages(question.text, *question.parts),
        "max_tokens": question.tokens,
    }
    if not stream:
        choice = client.chat.completions.create(**options).choices[0]
        assert choice.finish_reason
        return choice.message.content or ""
    text, reason = "", None
    for event in client.chat.completions.create(**options, stream=True):
        text += event.choices[0].delta.content or ""
        reason = event.choices[0].finish_reason or reason
    assert reason
    return text


def count_memory(process: Any) -> int:
    """Bytes of a server and its readers."""
    own = psutil.Process(process.pid)
    return sum(each.memory_info().rss for each in [own, *own.children()])


def run_load(process: Any, address: str, load: Load, clients: int, seconds: float) -> list[int]:
    """Ask for some time, then end the server under this load; returns its memory all along."""
    memory = []
    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(load.run_client, number) for number in range(clients)]
        try:
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                time.sleep(0.5)
                memory.append(count_memory(process))
                failed = [each.exception() for each in running if each.done()]
                assert not failed, failed
            text = requests.get(f"{address.removesuffix('/v1')}/metrics").text
            assert 'status="5' not in text and 'status="4' not in text
            load.signalled = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            load.ended.set()
        for each in running:
            each.result()
    return memory


@pytest.mark.slow
def test_eight_clients_and_the_end_of_the_server(folder: Path, questions: list[Question]) -> None:
    with start_server(folder, "--batch", "4", "--readers", "1") as (process, address):
        load = Load(address, questions)
        run_load(process, address, load, 8, 3)
    assert load.answered > 16


@pytest.mark.soak
def test_64_clients_for_a_minute(
    folder: Path, questions: list[Question], capsys: pytest.CaptureFixture[str]
) -> None:
    with start_server(folder) as (process, address):
        alone = Load(address, questions)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(alone.run_client, 0)
            time.sleep(5)  # its media are kept by then
            first = alone.answered
            time.sleep(10)
            one = (alone.answered - first) / 10
            alone.ended.set()
            running.result()
        load = Load(address, questions)
        memory = run_load(process, address, load, 64, 60)
    many = load.answered / 60
    warm, most = max(memory[:20]), max(memory)
    with capsys.disabled():
        print(
            f"\n{load.answered} answers, {many:.1f}/s by 64 clients, {one:.1f}/s by one: "
            f"{many / one:.1f} ×; memory {warm >> 20} MiB after 10 s, {most >> 20} MiB at most"
        )
    assert most - warm < 100 << 20
    assert many >= 3 * one, (many, one)
