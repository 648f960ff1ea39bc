"""Every benchmark from its official layout to a score: gold answers, shuffled ones, a model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from benchmark_trees import TREES

from onellm_dist.evaluation.answer_folder import AnswerWriter, WrittenAnswer, write_task
from onellm_dist.evaluation.benchmark_data import list_media
from onellm_dist.evaluation.evaluate import EvaluationOptions, evaluate_model
from onellm_dist.evaluation.questions import BenchmarkQuestion
from onellm_dist.evaluation.score import TaskScore, score_folder, score_task, write_scores
from onellm_dist.evaluation.scorers import coco_captions
from onellm_dist.evaluation.tasks import all_tasks, get_task
from onellm_dist.shards.format.dataset import open_dataset

pytest_plugins = ("benchmark_fixtures",)
DataOf = Callable[[str], Path]
QUESTIONS = {
    "mmbench": 6,
    "mme": 10,
    "nyuv2-depth": 3,
    "nyuv2-normal": 3,
    "scienceqa": 3,
    "seedbench": 3,
}
"""Benchmarks whose fixture has other than 4 questions."""
UNSCORED = ("mmvet", "objaverse-class")
"""Benchmarks that another model scores."""
EXACT = (
    "gqa",
    "scienceqa",
    "seedbench",
    "nextqa",
    "how2qa",
    "msvd-qa",
    "music-avqa",
    "clotho-aqa",
    "nyuv2-depth",
    "nyuv2-normal",
    "sunrgbd-depth",
    "sunrgbd-normal",
)
"""Benchmarks whose score is the mean over questions that are right or wrong."""
CEILING = {"mme": 400.0, "clotho-aqa": 100.0}
"""Best score where it is not 100: MME's fixture has two tasks of perception."""


@pytest.fixture(autouse=True)
def plain_tokens(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Words in place of PTB tokens: a start of Java costs a second (see test_scorers.py)."""

    def tokenize(texts: dict[str, Sequence[str]]) -> dict[str, list[str]]:
        return {key: [t.lower().strip(".") for t in some] for key, some in texts.items()}

    monkeypatch.setattr(coco_captions, "tokenize", tokenize)

    def run_meteor(*tokens: Any) -> tuple[float, Sequence[float]]:
        scores = coco_captions._score_rouge(*tokens)
        return sum(scores) / len(scores), scores

    monkeypatch.setattr(coco_captions, "_run_meteor", run_meteor)
    coco_captions._tokenize_all.cache_clear()


def list_questions(data: Path, name: str) -> list[BenchmarkQuestion]:
    dataset = open_dataset(data / f"{name}-eval")
    task = get_task(name)
    media = list_media(dataset, task, task.split, None)
    return [question for medium in media for question in medium.questions]


def write_answers(
    folder: Path, questions: Sequence[BenchmarkQuestion], answers: Sequence[str]
) -> None:
    name = folder.name
    settings = {
        "task": name,
        "split": "test",
        "prompt": "paper",
        "format": "raw",
        "as_reference": False,
        "model": "m",
        "dataset": "d",
        "limit": None,
        "questions": len(questions),
    }
    write_task(folder, settings, questions)
    with AnswerWriter(folder) as writer:
        writer.write(
            WrittenAnswer(q.id, "", answer, 1, "eos")
            for q, answer in zip(questions, answers, strict=True)
        )


def get_gold(question: BenchmarkQuestion) -> str:
    """The answer that most references give."""
    return max(question.answers, key=list(question.answers).count)


def test_every_task_has_a_fixture_and_a_source() -> None:
    assert set(TREES) == set(all_tasks()) and len(TREES) == 29


@pytest.mark.parametrize("name", TREES)
@pytest.mark.seconds
def test_gold_answers_reach_the_ceiling_and_shuffled_ones_do_not(
    name: str, benchmark_data: DataOf, tmp_path: Path
) -> None:
    questions = list_questions(benchmark_data(name), name)
    assert len(questions) == QUESTIONS.get(name, 4)
    gold = [get_gold(question) for question in questions]
    write_answers(tmp_path / name, questions, gold)
    found = score_task(tmp_path / name)
    write_scores(tmp_path, [found])  # answer files keep their servers' rules
    task = found.task
    if name in UNSCORED:
        assert not found.measures and set(found.missing) == set(task.paper)
        assert task.answer_files is not None
        return
    first = found.measures[0]
    best = CEILING.get(name, 100.0)
    assert first.name in task.paper or name == "msvd-qa"
    if first.name == "CIDEr":  # its ceiling depends on how far references differ
        best = first.value
        assert best > 100
    elif name in ("vqav2", "okvqa"):
        best = first.value
        assert best == pytest.approx((100 + 100 + 100 + 100) / 4)
    assert first.value == pytest.approx(best)
    shuffled = tmp_path / "shuffled" / name
    write_answers(shuffled, questions, gold[1:] + gold[:1])
    assert score_task(shuffled).measures[0].value < best - 20


@pytest.mark.parametrize("name", EXACT)
def test_shuffled_answers_score_as_chance(
    name: str, benchmark_data: DataOf, tmp_path: Path
) -> None:
    """Over all turns of the gold answers the mean score is the share of answers that agree."""
    questions = list_questions(benchmark_data(name), name)
    gold = [get_gold(question) for question in questions]
    scores = []
    for turn in range(len(gold)):
        folder = tmp_path / str(turn) / name
        write_answers(folder, questions, gold[turn:] + gold[:turn])
        scores.append(score_task(folder).measures[0].value)
    agreeing = sum(answer in question.answers for question in questions for answer in gold)
    assert sum(scores) / len(scores) == pytest.approx(100 * agreeing / len(gold) ** 2)


@pytest.mark.slow
def test_a_model_answers_every_benchmark(
    toy_model: tuple[Any, Any], benchmark_data: DataOf, tmp_path: Path
) -> None:
    for name in TREES:
        data = benchmark_data(name)
    options = EvaluationOptions(limit=2, batch=4, format="raw")
    model, tokenizer = toy_model
    for task in all_tasks():
        statistics = evaluate_model(
            model, tokenizer, [task], data, tmp_path, options, identity="toy"
        )
        assert statistics.prompts == 2
    scores = score_folder(tmp_path)
    assert {score.task.name for score in scores} == set(TREES)
    for score in scores:
        assert_answered(score)


def assert_answered(score: TaskScore) -> None:
    assert len(score.answers) == 2
    assert all(answer.prompt for answer in score.answers.values())
    assert list((score.folder / "examples").glob("*.png"))
    assert score.measures or score.task.name in UNSCORED


def test_how2qa_draws_the_order_of_its_options(benchmark_data: DataOf) -> None:
    questions = list_questions(benchmark_data("how2qa"), "how2qa")
    letters = [q.answers[0] for q in questions]
    assert len(set(letters)) > 1
    for i, question in enumerate(questions):
        assert question.options["ABCD".index(letters[i])] == f"right{i}"
