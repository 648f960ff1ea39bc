"""What `onellm evaluate` writes for a task, and `onellm score` reads; without torch.

    OUT/gqa/task.json          task, split, prompt, decoding, model, dataset
           /questions.jsonl    every question that is asked, with its references
           /answers/*.jsonl    answers, one file for each process that answered
           /examples/*.png     what some questions are about

An answer is one line, synced to the disk before the next questions are asked. A process that is
killed leaves at most half a line, which is not read. Nothing is ever rewritten: a process that
resumes writes a file of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.files import sync, unique_name, write_atomic
from onellm_dist.evaluation.questions import BenchmarkQuestion

TASK_FILE = "task.json"
QUESTIONS_FILE = "questions.jsonl"
ANSWERS = "answers"
EXAMPLES = "examples"
_COUNTS = ("limit", "questions", "split_questions", "dataset_questions", "readable_questions")
"""Settings on which no answer depends: a limit may grow, a dataset's number be known later."""


@dataclass(frozen=True)
class WrittenAnswer:
    """One line of a file of answers."""

    id: str
    """Identifier of the question."""
    prompt: str
    """Everything the model read as text."""
    answer: str
    """The model's answer, without special tokens, cut at the stop string."""
    tokens: int
    """New tokens, those that ended the answer included."""
    ended: str
    """`eos`, `stop string` or `length`."""


class AnswerWriter:
    """Appends answers to a file of this process's own.

    Args:
        folder: the task's folder.
    """

    def __init__(self, folder: Path) -> None:
        place = folder / ANSWERS
        place.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            path = place / f"{unique_name()}-{number}.jsonl"
            try:
                self._file = path.open("xb")
                break
            except FileExistsError:
                number += 1
        sync(place)

    def __enter__(self) -> AnswerWriter:
        """Enter the context."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._file.close()

    def write(self, answers: Iterable[WrittenAnswer]) -> None:
        """Append answers, and wait until they are on the disk."""
        lines = [json.dumps(asdict(answer), ensure_ascii=True) + "\n" for answer in answers]
        self._file.write("".join(lines).encode("ascii"))
        self._file.flush()
        os.fsync(self._file.fileno())


def read_answers(folder: Path) -> dict[str, WrittenAnswer]:
    """Read the answers of all processes: id -> answer.

    Raises:
        UsageError: a question was answered twice; the message names it and the files.
        OneLLMError: a line that is not the last one of its file is damaged.
    """
    found: dict[str, WrittenAnswer] = {}
    places: dict[str, Path] = {}
    for path in sorted((folder / ANSWERS).glob("*.jsonl")):
        for answer in _read_file(path):
            if answer.id in found:
                raise UsageError(
                    f"{folder.name}: question {answer.id} is answered in {places[answer.id]} and "
                    f"in {path}",
                    "it would count twice.",
                    "two evaluations wrote into one folder: remove one of the files.",
                )
            found[answer.id] = answer
            places[answer.id] = path
    return found


def count_answered_lines(out: Path) -> int:
    """Complete lines of answers in all folders of tasks below a folder; nothing is checked."""
    return sum(path.read_bytes().count(b"\n") for path in out.glob(f"**/{ANSWERS}/*.jsonl"))


def _read_file(path: Path) -> Iterator[WrittenAnswer]:
    *whole, _torn = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole):
        try:
            yield WrittenAnswer(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise OneLLMError(
                f"{path}: line {number + 1} is not an answer: {error}",
                "an answer would be lost.",
                "restore the file, or remove the line: its question is asked again.",
            ) from error


def check_known(
    folder: Path, questions: Sequence[BenchmarkQuestion], answers: Mapping[str, WrittenAnswer]
) -> None:
    """Check that every answer belongs to a question.

    Raises:
        UsageError: one does not; the message names it.
    """
    unknown = sorted(answers.keys() - {question.id for question in questions})
    if unknown:
        raise UsageError(
            f"{folder}: there is an answer to {unknown[0]}, which is not asked"
            f"{f' ({len(unknown)} such answers)' if len(unknown) > 1 else ''}",
            "it belongs to another set of questions.",
            "use another folder, or remove the files of its answers.",
        )


def write_task(
    folder: Path, settings: Mapping[str, Any], questions: Sequence[BenchmarkQuestion]
) -> None:
    """Write what is asked; all ranks write the same, and so does one that resumes.

    Args:
        folder: the task's folder.
        settings: what answers depend on, and counts, which may change.
        questions: the questions that are asked.

    Raises:
        UsageError: the folder holds answers to something else; the message says what differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / TASK_FILE).exists():
        before = read_settings(folder)
        known = [k for k in settings if k not in _COUNTS]
        changed = [k for k in known if before.get(k) != settings[k]]
        if changed:
            listed = "; ".join(
                f"{k}: {before.get(k)!r} there, {settings[k]!r} now" for k in changed
            )
            raise UsageError(
                f"{folder} holds answers of another evaluation ({listed})",
                "answers of both would be mixed.",
                "choose another --out, or evaluate as before.",
            )
    check_known(folder, questions, read_answers(folder))
    lines = [json.dumps(question.to_json(), ensure_ascii=True) for question in questions]
    _write_once(folder / QUESTIONS_FILE, "".join(f"{line}\n" for line in lines))
    _write_once(folder / TASK_FILE, json.dumps(settings, indent=1, sort_keys=True) + "\n")


def _write_once(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_atomic(path, text)


def read_settings(folder: Path) -> dict[str, Any]:
    """Read what a task was asked with.

    Raises:
        UsageError: the folder is none of a task.
    """
    try:
        settings: dict[str, Any] = json.loads((folder / TASK_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder}: {error}",
            "what was asked stands in task.json.",
            "give the --out of `onellm evaluate`.",
        ) from None
    return settings


def read_questions(folder: Path) -> list[BenchmarkQuestion]:
    """Read the questions of a task, in their order."""
    with (folder / QUESTIONS_FILE).open(encoding="utf-8") as file:
        return [BenchmarkQuestion.from_json(json.loads(line)) for line in file]


def list_task_folders(out: Path) -> list[Path]:
    """The folders of the tasks below an output folder.

    Raises:
        UsageError: there are none.
    """
    found = sorted(path.parent for path in out.glob(f"*/{TASK_FILE}"))
    if not found:
        raise UsageError(
            f"{out}: no task has been evaluated there",
            "there is nothing to score.",
            "give the --out of `onellm evaluate`; with --adapter NAME it is OUT/NAME.",
        )
    return found


def name_picture(medium: str) -> str:
    """Name of the file in `examples/` that shows a medium, without its extension.

    Args:
        medium: as the questions about it name it.
    """
    return hashlib.sha256(medium.encode("utf-8", "surrogatepass")).hexdigest()[:16]
