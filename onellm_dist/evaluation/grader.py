"""Asks another model for scores, through any server that speaks OpenAI's chat completions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.logging import get_logger
from onellm_dist.common.progress import progress
from onellm_dist.evaluation.answer_folder import read_answers, read_questions, read_settings
from onellm_dist.evaluation.grades import Grade, GradeWriter, digest_prompt, read_grades
from onellm_dist.evaluation.questions import GivenAnswer
from onellm_dist.evaluation.tasks import get_task
from onellm_dist.evaluation.tasks.grading import Grading

KEY_VARIABLE = "OPENAI_API_KEY"
TEMPERATURES = (0.0, 0.5, 1.0)
"""Of the tries: a reply that cannot be read is asked for again, as MM-Vet's program does."""
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
    key_variable: str = KEY_VARIABLE
    """Environment variable with the key; a server of one's own may need none."""


def grade_task(folder: Path, grader: Grader) -> int:
    """Grade the answers of a task that this model has not graded yet.

    Args:
        folder: the task's folder.
        grader: the model.

    Returns:
        Number of new grades; 0 for a task that has a rule.

    Raises:
        UsageError: the address is none, or the package openai is missing.
        OneLLMError: the server refuses; what was graded is kept.
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
        ThreadPoolExecutor(PARALLEL) as pool,
        progress(len(asked), f"Grading {folder.name}", unit="answers") as bar,
    ):
        waiting = {
            pool.submit(_ask, client, grader, grading, prompt): (name, prompt)
            for name, prompt in asked
        }
        for done in as_completed(waiting):
            name, prompt = waiting[done]
            try:
                reply, value = done.result()
            except CancelledError:
                continue
            except OneLLMError as error:
                failure = failure or error
                for other in waiting:  # those under way still come: they are paid for
                    other.cancel()
                continue
            bar.advance()
            if value is None:
                unread += 1
                logger.warning("%s: the grader's reply cannot be read: %r", name, reply)
            else:
                digest = digest_prompt(prompt)
                writer.write(Grade(name, grader.model, digest, value, reply))
    if failure is not None:
        raise failure
    return len(asked) - unread


def _open_client(grader: Grader) -> Any:
    if not grader.url.startswith(("http://", "https://")):
        raise UsageError(
            f"--grader {grader.url} is not an address",
            "answers are sent there.",
            "write the base of an OpenAI-compatible API: https://HOST/v1.",
        )
    try:
        from openai import OpenAI
    except ImportError:
        raise UsageError(
            "the package openai is not installed",
            "it speaks to the grader.",
            "pip install onellm-dist[eval]",
        ) from None
    key = os.environ.get(grader.key_variable) or "none"
    return OpenAI(base_url=grader.url, api_key=key, timeout=TIMEOUT_S, max_retries=4)


def _ask(client: Any, grader: Grader, grading: Grading, prompt: str) -> tuple[str, float | None]:
    """Ask until a reply can be read: the last reply, and its value."""
    from openai import OpenAIError

    reply, value = "", None
    for temperature in TEMPERATURES:
        try:
            found = client.chat.completions.create(
                model=grader.model,
                messages=[{"role": "user", "content": prompt}],
                temperature=temperature,
                max_tokens=grading.max_tokens,
            )
        except OpenAIError as error:
            raise OneLLMError(
                f"{grader.url}: {_hide_key(str(error), grader)}",
                "the answers that are left have no grade; those that have one keep it.",
                f"check the address, the model {grader.model} and the key in "
                f"{grader.key_variable}, and run the command again.",
            ) from None
        reply = (found.choices[0].message.content or "") if found.choices else ""
        value = grading.read(reply)
        if value is not None:
            break
    return reply, value


def _hide_key(text: str, grader: Grader) -> str:
    """An error without the key, which servers like to repeat."""
    key = os.environ.get(grader.key_variable)
    return text.replace(key, "***") if key else text
