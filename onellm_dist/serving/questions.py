"""The questions of `onellm generate`: prompts about the same files, or the lines of a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.modalities import all_modalities
from onellm_dist.model.adapters.adapter_set import AdapterSet, NamedAdapter, check_adapters
from onellm_dist.serving.ask_files import answer_prepared, open_for_generation, prepare_question
from onellm_dist.serving.generate import Answer, DecodingOptions


@dataclass(frozen=True)
class AskedQuestion:
    """A prompt, and the files that it is about."""

    prompt: str
    files: Sequence[tuple[str, Path]]
    """(modality, file) pairs."""
    line: int | None = None
    """Line of the question in its file."""
    adapter: str = ""
    """Name of the adapter that answers it; "": the model alone."""


def read_questions(path: Path) -> list[AskedQuestion]:
    """Read questions from a file with a JSON object in each line.

    An object has `prompt`, and files under the names of modalities: a path, or a list of them.
    Paths are relative to the file.

    Args:
        path: the file.

    Raises:
        UsageError: it cannot be read, or a line is not such an object.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--jsonl {path}: {error}", "there are no questions to read.", "check the file."
        ) from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UsageError(f"--jsonl {path}: it is empty", "there are no questions.", "fill it.")
    return [_parse_line(path, number, line) for number, line in numbered]


def _parse_line(path: Path, number: int, line: str) -> AskedQuestion:
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError("it is not a JSON object")
        prompt = fields.pop("prompt", "")
        unknown = sorted(fields.keys() - all_modalities().keys())
        if not isinstance(prompt, str) or unknown:
            raise ValueError(f"it has {unknown[0]!r}" if unknown else "its prompt is not a text")
        return AskedQuestion(prompt, _list_files(path.parent, fields), number)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"{path}, line {number}: {error}",
            "the question cannot be read.",
            f"give objects with prompt and files of {', '.join(all_modalities())}.",
        ) from None


def _list_files(folder: Path, fields: Mapping[str, Any]) -> list[tuple[str, Path]]:
    files: list[tuple[str, Path]] = []
    for name, given in fields.items():
        paths = given if isinstance(given, list) else [given]
        if not all(isinstance(path, str) for path in paths):
            raise ValueError(f"its {name} is not a path")
        files += [(name, folder / path) for path in paths]
    return files


def answer_questions(
    model: Path,
    questions: Sequence[AskedQuestion],
    *,
    order: str = "",
    prompt_format: str = "auto",
    decoding: DecodingOptions | None = None,
    on_text: Callable[[str], None] | None = None,
    on_answer: Callable[[AskedQuestion], None] | None = None,
    adapters: Sequence[NamedAdapter] = (),
) -> Iterator[tuple[AskedQuestion, Answer | OneLLMError]]:
    """Answer questions one after the other; each with every adapter, where there are some.

    The first one is read before the model is loaded. Where there are several, one that cannot be
    answered does not keep the others from being answered.

    Args:
        model: a directory of a saved model.
        questions: the questions.
        order: as of `prepare_question`.
        prompt_format: as of `prepare_question`.
        decoding: how new tokens are chosen; default: greedily.
        on_text: called with the text of the answers, piece by piece, as it comes.
        on_answer: called with each question that could be read, before its answer comes.
        adapters: adapters of the model.

    Yields:
        Each question, and its answer or why it has none.

    Raises:
        OneLLMError: the model cannot be loaded, or the only question cannot be answered.
    """
    check_adapters(model, adapters)
    opened, loaded = None, None
    for question in questions:
        try:
            prepared = prepare_question(
                model, question.prompt, question.files, order=order, prompt_format=prompt_format
            )
        except OneLLMError as error:
            if len(questions) == 1:
                raise
            yield question, error
            continue
        opened = opened or open_for_generation(model)
        loaded = loaded or AdapterSet(opened[0], adapters)
        for name in loaded.names or [""]:
            loaded.select(name)
            asked = replace(question, adapter=name)
            if on_answer is not None:
                on_answer(asked)
            try:
                answer = answer_prepared(opened, prepared, decoding, on_text)
            except OneLLMError as error:
                if len(questions) == 1:
                    raise
                yield asked, error
                continue
            yield asked, answer
