"""Asks another model for scores, through any server that speaks OpenAI's chat completions."""

from __future__ import annotations

import ipaddress
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.extras import get_install_command
from onellm_dist.common.logging import get_logger
from onellm_dist.common.progress import progress
from onellm_dist.evaluation.answer_folder import read_answers, read_questions, read_settings
from onellm_dist.evaluation.grades import Grade, GradeWriter, digest_prompt, read_grades
from onellm_dist.evaluation.questions import GivenAnswer
from onellm_dist.evaluation.tasks import get_task
from onellm_dist.evaluation.tasks.grading import Grading

KEY_VARIABLE = "OPENAI_API_KEY"
KEY_HOST = "api.openai.com"
"""Whose key that is: without being asked to, it is sent nowhere else."""
TEMPERATURES = (0.0, 0.5, 1.0)
"""Temperatures of the tries: a reply that cannot be read is asked for again, as by MM-Vet's
program."""
PARALLEL = 8
"""Requests at a time."""
TIMEOUT_S = 120.0

logger = get_logger(__name__)


@dataclass(frozen=True)
class Grader:
    """Which model grades, and where it is."""

    url: str
    """Base of the API, such as https://api.openai.com/v1."""
    model: str
    key_variable: str | None = None
    """Environment variable with the key. None: KEY_VARIABLE for KEY_HOST by https, else no key."""

    def find_key(self) -> str:
        """The key that is sent; "" for none.

        Raises:
            UsageError: the address is none, or others could read the key on its way.
        """
        scheme, host = _split_url(self.url)
        variable = self.key_variable
        if variable is None and (scheme, host) == ("https", KEY_HOST):
            variable = KEY_VARIABLE
        key = os.environ.get(variable, "") if variable else ""
        if key and scheme != "https" and not _is_loopback(host):
            raise UsageError(
                f"--grader {self.url} with the key in {variable}",
                "http sends it in clear text, for anyone on the way to read.",
                "use an address with https://, or leave --grader-key out if the server needs none.",
            )
        return key


def grade_task(folder: Path, grader: Grader) -> int:
    """Grade the answers of a task that this model has not graded yet.

    Args:
        folder: the task's folder.
        grader: the model.

    Returns:
        Number of new grades; 0 for a task that has a rule.

    Raises:
        UsageError: the address is none, or the package openai is missing.
        OneLLMError: the server refuses, or its replies are none; what was graded is kept.
    """
    grading = get_task(read_settings(folder)["task"]).grading
    if grading is None:
        return 0
    answers, graded = read_answers(folder), read_grades(folder)
    asked = []
    for question in read_questions(folder):
        if question.id in answers and question.answers:
            prompt = grading.build(GivenAnswer(question, answers[question.id].answer))
            if question.id not in graded.get((grader.model, digest_prompt(prompt)), {}):
                asked.append((question.id, prompt))
    return _ask_all(folder, grader, grading, asked) if asked else 0


def _ask_all(
    folder: Path, grader: Grader, grading: Grading, asked: Sequence[tuple[str, str]]
) -> int:
    client = _open_client(grader)
    unread, failure = 0, None
    with (
        GradeWriter(folder) as writer,
        _open_pool() as pool,
        progress(len(asked), f"Grading {folder.name}", unit="answers") as bar,
    ):
        waiting: dict[Future[tuple[str, float | None]], tuple[str, str]] = {}
        left = deque(asked)
        while left or waiting:
            try:
                while left:
                    question = left.popleft()
                    waiting[pool.submit(_ask, client, grader, grading, question[1])] = question
                for done in as_completed(waiting):
                    unread += not _keep(writer, grader, *waiting[done], *done.result())
                    del waiting[done]
                    bar.advance()
            except BaseException as error:  # Ctrl-C and a full disk too
                failed = {future for future in waiting if _has_failed(future)}
                if failure is not None and not failed:
                    raise
                failure = failure or error
                left.clear()
                pool.shutdown(wait=False, cancel_futures=True)
                waiting = {
                    future: question
                    for future, question in waiting.items()
                    if future not in failed and not future.cancelled()
                }
                if waiting:
                    logger.warning("%d answers are being graded, and waited for", len(waiting))
    if failure is not None:
        raise failure
    return len(asked) - unread


@contextmanager
def _open_pool() -> Iterator[ThreadPoolExecutor]:
    """Threads that begin nothing more when the block is left: each reply costs money."""
    pool = ThreadPoolExecutor(PARALLEL)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _has_failed(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is not None


def _keep(
    writer: GradeWriter, grader: Grader, name: str, prompt: str, reply: str, value: float | None
) -> bool:
    """Write a grade, if the reply is one."""
    if value is None:
        logger.warning("%s: the grader's reply cannot be read: %r", name, reply)
        return False
    writer.write(Grade(name, grader.model, digest_prompt(prompt), value, reply))
    return True


def _split_url(url: str) -> tuple[str, str]:
    """The scheme and the host of an address.

    Raises:
        UsageError: it is none.
    """
    try:
        parts = urlsplit(url)
        scheme, host = parts.scheme, parts.hostname
    except ValueError:
        scheme, host = "", None
    if scheme not in ("http", "https") or not host:
        raise UsageError(
            f"--grader {url} is not an address",
            "answers are sent there.",
            "write the base of an OpenAI-compatible API: https://HOST/v1.",
        )
    return scheme, host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _open_client(grader: Grader) -> Any:
    key = grader.find_key()
    try:
        from openai import OpenAI
    except ImportError:
        raise UsageError(
            "the package openai is not installed",
            "it speaks to the grader.",
            get_install_command("eval"),
        ) from None
    return OpenAI(base_url=grader.url, api_key=key or "none", timeout=TIMEOUT_S, max_retries=4)


def _ask(client: Any, grader: Grader, grading: Grading, prompt: str) -> tuple[str, float | None]:
    """Ask until a reply can be read: the last reply, and its value."""
    reply, value = "", None
    for temperature in TEMPERATURES:
        reply = _ask_once(client, grader, grading, prompt, temperature)
        value = grading.read(reply)
        if value is not None:
            break
    return reply, value


def _ask_once(
    client: Any, grader: Grader, grading: Grading, prompt: str, temperature: float
) -> str:
    from openai import OpenAIError

    left = "the answers that are left have no grade; those that have one keep it."
    try:
        found = client.chat.completions.create(
            model=grader.model,
            messages=[{"role": "user", "content": prompt}],
            temperature=temperature,
            max_tokens=grading.max_tokens,
        )
        content = found.choices[0].message.content if found.choices else None
        if not isinstance(content, str | None):
            raise TypeError(f"its content is of type {type(content).__name__}")
    except OpenAIError as error:
        variable = grader.key_variable or KEY_VARIABLE
        key = f"the key in {variable}" if grader.find_key() else "the key (--grader-key NAME)"
        raise OneLLMError(
            f"{grader.url}: {_hide_key(str(error), grader)}",
            left,
            f"check the address, the model {grader.model} and {key}, and run the command again.",
        ) from None
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        why = _hide_key(str(error), grader)
        raise OneLLMError(
            f"{grader.url}: no chat completion came back ({type(error).__name__}: {why})",
            left,
            "check the address: it is the base of an OpenAI-compatible API, often https://HOST/v1.",
        ) from None
    return content or ""


def _hide_key(text: str, grader: Grader) -> str:
    """An error without the key, which servers like to repeat."""
    key = grader.find_key()
    return text.replace(key, "***") if key else text
