"""An engine whose requests and events are at hand, and prompts for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import served_model as served
import torch

from onellm_dist.model.generation.batched import generate_batch
from onellm_dist.model.generation.media_cache import Medium
from onellm_dist.model.generation.rows import Prompt
from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.serving.server.engine import AnswerEngine
from onellm_dist.serving.server.errors import RequestError
from onellm_dist.serving.server.jobs import Job, JobQueue, Piece, TokenRecord
from onellm_dist.serving.server.metrics import ServerMetrics

MODEL = served.make_model()
TOKENIZER = load_toy_tokenizer()


class Desk:
    """An engine, and a log of what it sends.

    Args:
        batch: most requests that it answers together.
    """

    def __init__(self, batch: int = 4) -> None:
        self.queue, self.metrics = JobQueue(20), ServerMetrics()
        self.engine = AnswerEngine(MODEL, TOKENIZER, [2], self.queue, self.metrics, batch)
        self.log: list[tuple[str, Any]] = []

    def ask(
        self,
        name: str,
        prompt: Prompt,
        then: Callable[[], object] | None = None,
        top_logprobs: int | None = None,
    ) -> Job:
        """Put a request into the queue; with its first text, the engine's thread calls `then`."""

        def send(event: Any) -> None:
            is_first = all(logged != name for logged, _ in self.log)
            self.log.append((name, event))
            if is_first and then is not None:
                then()

        job = Job(prompt, (), top_logprobs, time.monotonic() + 60, send)
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

    def get_records(self, name: str) -> list[TokenRecord]:
        pieces = [e for n, e in self.log if n == name and isinstance(e, Piece)]
        return [record for piece in pieces for record in piece.records]

    def get_error(self, name: str) -> RequestError:
        (error,) = [e for n, e in self.log if n == name and not isinstance(e, Piece)]
        assert isinstance(error, RequestError)
        return error

    def read_metrics(self) -> dict[str, float]:
        lines = self.metrics.write().decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name: float(value) for name, value in pairs}


def compute_text(prompt: Prompt) -> str:
    (found,) = generate_batch(MODEL, [prompt], end_ids=[2])
    return str(TOKENIZER.decode(list(found.tokens), skip_special_tokens=True)).strip()


LONG = Prompt([1, 40, 41, 42, 43], max_new_tokens=60)
SHORT = Prompt([1, 50, 51], max_new_tokens=4)
BESIDE = Prompt([1, 50, 51], max_new_tokens=30)


def make_picture(seed: int) -> Medium:
    generator = torch.Generator().manual_seed(seed)
    return Medium("image", torch.randn(3, 224, 224, generator=generator), f"picture {seed}")


def make_prompt(*seeds: int) -> Prompt:
    """A prompt of its own for all pictures, so that each answer is."""
    media = [make_picture(seed) for seed in seeds]
    return Prompt([1, 60 + sum(seeds) * 7], media, max_new_tokens=5)
