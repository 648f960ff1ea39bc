"""`onellm evaluate`: answers to benchmarks, rank by rank, without any exchange between ranks.

Each rank computes by itself which questions are its own, leaves out those that any process has
answered already, and writes what it answers into a file of its own. Ranks may start, end and be
killed at any time; the same command, on any number of ranks, answers what is missing.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.logging import get_logger
from onellm_dist.common.progress import progress
from onellm_dist.evaluation.answer_folder import (
    EXAMPLES,
    AnswerWriter,
    WrittenAnswer,
    name_picture,
    read_answers,
    write_task,
)
from onellm_dist.evaluation.assignment import assign
from onellm_dist.evaluation.benchmark_data import (
    AskedMedium,
    ReadMedium,
    SplitCounts,
    count_split,
    list_media,
    read_media,
)
from onellm_dist.evaluation.datasets import find_dataset
from onellm_dist.evaluation.loading import identify_model, load_for_evaluation
from onellm_dist.evaluation.question_format import QuestionFormat
from onellm_dist.evaluation.questions import BenchmarkQuestion
from onellm_dist.evaluation.stop_request import StopRequest
from onellm_dist.evaluation.tasks import Task, get_task
from onellm_dist.launch.ranks import Ranks
from onellm_dist.modalities import get_modality
from onellm_dist.model.adapters.adapter_set import AdapterSet, NamedAdapter, check_adapters
from onellm_dist.model.generation.batched import (
    BATCH,
    BatchStatistics,
    Continuation,
    MediaCache,
    Medium,
    Prompt,
    generate_batch,
)
from onellm_dist.shards.format.dataset import Dataset, open_dataset

logger = get_logger(__name__)
EXAMPLE_COUNT = 8
"""Media of a task that are drawn for the page."""
Generate = Callable[..., list[Continuation]]
"""Called as `generate_batch` is."""
WINDOW = 4
"""Batches that are sorted by length together."""
_REFERENCE_TEMPERATURE, _REFERENCE_TOP_P, _REFERENCE_SEED = 0.1, 0.75, 1
_CHARACTERS_A_TOKEN = 4


@dataclass(frozen=True)
class EvaluationOptions:
    """How benchmarks are asked."""

    split: str | None = None
    """The split; None: each task's own."""
    prompt: str | None = None
    """Name of the prompt; None: each task's own."""
    format: str = "conversation"
    """One of `question_format.FORMATS`."""
    limit: int | None = None
    """Only the first N questions of each task."""
    any_count: bool = False
    """Whether questions may be missing, because their media could not be read."""
    as_reference: bool = False
    """Decode as the reference's scripts: temperature 0.1, top-p 0.75, 128 new tokens."""
    batch: int = BATCH
    """Prompts that are answered together."""
    reuse_media: bool = True
    """Whether a medium with several questions is encoded once."""
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class _Asked:
    """A question with its prompt."""

    question: BenchmarkQuestion
    text: str
    prompt: Prompt


def evaluate_model(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    data: Path,
    out: Path,
    options: EvaluationOptions,
    *,
    identity: str,
    stop: StopRequest | None = None,
    generate: Generate = generate_batch,
) -> BatchStatistics:
    """Answer this rank's questions of some tasks.

    Args:
        model: a OneLLMForConditionalGeneration.
        tokenizer: its tokenizer.
        tasks: their names.
        data: folder of their datasets.
        out: the output folder.
        options: how they are asked.
        identity: what the answers depend on of the model (`identify_model`).
        stop: notices a request to stop; default: one made from now on.
        generate: answers prompts.

    Raises:
        StoppedError: the evaluation was asked to stop.
        UsageError: an unknown task, prompt, format or split; a dataset that is not there or not
            complete; or an output folder with answers of another evaluation.
        SampleError: a medium cannot be read.
    """
    statistics, stop = BatchStatistics(), stop or StopRequest(out)
    model.eval()
    form = QuestionFormat(tokenizer, options.format)
    opened = [(task, open_dataset(find_dataset(data, task))) for task in map(get_task, tasks)]
    for task, dataset in opened:
        if missing := sorted(set(dataset.modalities) - set(model.config.modalities)):
            raise UsageError(
                f"task {task.name} needs the modality {', '.join(missing)}",
                f"the model reads {', '.join(model.config.modalities)}.",
                "leave the task out, or use a model that was trained on it.",
            )
    for task, dataset in opened:
        _evaluate_task(
            model, form, task, dataset, out, options, statistics, identity, stop, generate
        )
    return statistics


def evaluate_folder(
    folder: Path,
    tasks: Sequence[str],
    data: Path,
    out: Path,
    options: EvaluationOptions,
    ranks: Ranks | None,
    adapters: Sequence[NamedAdapter] = (),
) -> str:
    """Answer this process's questions with a saved model, and say what was done in one line.

    Args:
        folder: the model's folder.
        tasks: names of tasks.
        data: folder of their datasets.
        out: the output folder.
        options: how they are asked; `ranks` decides which questions.
        ranks: this process's place among the ranks; None: there is one.
        adapters: adapters of the model; each answers, in a folder of `out` with its name.

    Raises:
        StoppedError: the evaluation was asked to stop.
        UsageError: as `evaluate_model`, there is no model, or an adapter is not of this model.
    """
    check_adapters(folder, adapters)
    stop = StopRequest(out)
    model, tokenizer = load_for_evaluation(folder, 0 if ranks is None else ranks.local_rank)
    if ranks is not None:
        options = replace(options, rank=ranks.rank, world_size=ranks.world_size)
    loaded, folders = AdapterSet(model, adapters), {a.name: a.folder for a in adapters}
    said = []
    for name in loaded.names or [""]:
        loaded.select(name)
        place = out / name if name else out
        identity = identify_model(folders[name], folder) if name else identify_model(folder)
        found = evaluate_model(
            model, tokenizer, tasks, data, place, options, identity=identity, stop=stop
        )
        said.append(
            f"rank {options.rank}{f', {name}' if name else ''}: "
            f"{format_count(found.prompts, 'question')} "
            f"answered, {format_count(found.new_tokens, 'token')}, {found.padding_share:.0%} "
            "padding"
        )
    return "\n".join(said)


def _evaluate_task(
    model: Any,
    form: QuestionFormat,
    task: Task,
    dataset: Dataset,
    out: Path,
    options: EvaluationOptions,
    statistics: BatchStatistics,
    identity: str,
    stop: StopRequest,
    generate: Generate,
) -> None:
    split = options.split or task.split
    prompt_name, build = task.get_prompt(options.prompt)
    media = list_media(dataset, task, split, options.limit, any_count=options.any_count)
    questions = [question for medium in media for question in medium.questions]
    folder = out / task.name
    depends = {"split": split, "prompt": prompt_name, "model": identity}
    depends["dataset"] = dataset.fingerprint()
    counts = count_split(dataset, split, len(questions), options.limit)
    write_task(folder, _describe(task, options, len(questions), counts, depends), questions)
    answered = read_answers(folder).keys()
    mine = _choose_media(task, dataset, media, options, answered)
    drawn = frozenset(medium.key for medium in media[:EXAMPLE_COUNT])
    spans: dict[str, int] = dict(getattr(model.config, "spans", None) or {})
    if not (count := sum(len(medium.questions) for medium in mine)):
        return

    def ask(question: BenchmarkQuestion, read: ReadMedium) -> _Asked:
        text, ids = form.encode(build(question))
        own = [
            Medium(name, row, f"{read.content[name]} {i}" if options.reuse_media else None, i)
            for name, rows in read.values.items()
            for i, row in enumerate(rows)
        ]
        return _Asked(question, text, _make_prompt(task, question, ids, own, options))

    with (
        AnswerWriter(folder) as writer,
        progress(count, f"Answering {task.name}", unit="questions") as bar,
    ):
        cache = MediaCache() if options.reuse_media else None
        window: list[_Asked] = []

        def answer() -> None:
            for written in _answer(generate, model, form, window, options, cache, statistics):
                writer.write(written)
                bar.advance(len(written))
                stop.check()
            window.clear()

        with closing(read_media(dataset, mine, drawn, spans)) as found:
            for medium, read in zip(mine, found, strict=True):
                if read.picture is not None:
                    _keep_example(folder, medium.questions[0].medium, read.picture)
                window += [ask(question, read) for question in medium.questions]
                if len(window) >= WINDOW * options.batch:
                    answer()
        answer()


def _describe(
    task: Task,
    options: EvaluationOptions,
    asked: int,
    counts: SplitCounts,
    depends: dict[str, Any],
) -> dict[str, Any]:
    """What is asked, for `task.json`."""
    return {
        **depends,
        "task": task.name,
        "format": options.format,
        "as_reference": options.as_reference,
        "limit": options.limit,
        "questions": asked,
        "split_questions": counts.whole,
        "dataset_questions": counts.there,
        "readable_questions": counts.readable,
    }


def _answer(
    generate: Generate,
    model: Any,
    form: QuestionFormat,
    window: Sequence[_Asked],
    options: EvaluationOptions,
    cache: MediaCache | None,
    statistics: BatchStatistics,
) -> Iterator[list[WrittenAnswer]]:
    """Answer questions of similar length together; each batch is written as it ends."""
    ordered = sorted(window, key=lambda asked: -asked.prompt.positions)
    for first in range(0, len(ordered), options.batch):
        batch = ordered[first : first + options.batch]
        found = generate(
            model,
            [asked.prompt for asked in batch],
            end_ids=form.end_ids,
            stop=form.stop,
            batch=options.batch,
            media_cache=cache,
            statistics=statistics,
        )
        yield [
            WrittenAnswer(
                asked.question.id,
                asked.text,
                form.decode(continuation.tokens),
                len(continuation.tokens),
                continuation.ended,
            )
            for asked, continuation in zip(batch, found, strict=True)
        ]


def _choose_media(
    task: Task,
    dataset: Dataset,
    media: Sequence[AskedMedium],
    options: EvaluationOptions,
    answered: Any,
) -> list[AskedMedium]:
    """This rank's samples with the questions that nobody has answered yet."""
    encoding = sum(
        get_modality(name).tokens * get_modality(name).frames for name in dataset.modalities
    )
    costs = [
        encoding
        + sum(len(q.text) / _CHARACTERS_A_TOKEN + task.max_new_tokens for q in medium.questions)
        for medium in media
    ]
    mine = [media[i] for i in assign(costs, options.world_size)[options.rank]]
    left = (
        replace(medium, questions=[q for q in medium.questions if q.id not in answered])
        for medium in mine
    )
    return [medium for medium in left if medium.questions]


def _make_prompt(
    task: Task,
    question: BenchmarkQuestion,
    ids: Sequence[int],
    spans: Sequence[Medium],
    options: EvaluationOptions,
) -> Prompt:
    if not options.as_reference:
        return Prompt(ids, spans, task.max_new_tokens)
    # The reference draws all answers from one generator: here each question has a seed of its own.
    seed = _REFERENCE_SEED + zlib.crc32(f"{task.name}/{question.id}".encode())
    return Prompt(ids, spans, task.reference_tokens, _REFERENCE_TEMPERATURE, _REFERENCE_TOP_P, seed)


def _keep_example(folder: Path, medium: str, picture: bytes) -> None:
    place = folder / EXAMPLES
    place.mkdir(exist_ok=True)
    write_atomic(place / f"{name_picture(medium)}.png", picture)
