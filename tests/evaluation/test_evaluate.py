"""Answers survive: any ranks, any batches, any kills; nothing lost, nothing answered twice."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.evaluation import loading
from onellm_dist.evaluation.answer_folder import (
    ANSWERS,
    AnswerWriter,
    WrittenAnswer,
    read_answers,
)
from onellm_dist.evaluation.assignment import assign
from onellm_dist.evaluation.datasets import find_dataset
from onellm_dist.evaluation.evaluate import EvaluationOptions, evaluate_model
from onellm_dist.evaluation.score import build_results, score_folder, write_scores
from onellm_dist.evaluation.score_page import format_scores
from onellm_dist.evaluation.stop_request import StoppedError
from onellm_dist.evaluation.tasks import get_task
from onellm_dist.model.generation.batched import BatchStatistics

pytest_plugins = ("benchmark_fixtures",)
DataOf = Callable[[str], Path]
Ask = Callable[..., BatchStatistics]
TASK = "mme"
COUNT = 10
OFFICIAL = 2_374


@pytest.fixture
def ask(toy_model: tuple[Any, Any], benchmark_data: DataOf) -> Ask:
    data = benchmark_data(TASK)

    def run(out: Path, **options: Any) -> BatchStatistics:
        model, tokenizer = toy_model
        identity = options.pop("identity", "toy")
        given = EvaluationOptions(**{"format": "raw", **options})
        return evaluate_model(model, tokenizer, [TASK], data, out, given, identity=identity)

    return run


def read(out: Path) -> dict[str, WrittenAnswer]:
    return read_answers(out / TASK)


@pytest.fixture(scope="module")
def expected(
    toy_model: tuple[Any, Any], benchmark_data: DataOf, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, WrittenAnswer]:
    out = tmp_path_factory.mktemp("expected")
    options = EvaluationOptions(format="raw", batch=1, reuse_media=False)
    model, tokenizer = toy_model
    evaluate_model(model, tokenizer, [TASK], benchmark_data(TASK), out, options, identity="toy")
    found = read(out)
    assert len(found) == COUNT
    assert len({answer.answer for answer in found.values()}) > 2, "equal answers test nothing"
    return found


def test_shares_are_disjoint_complete_and_alike() -> None:
    rng = random.Random(0)
    costs = [rng.randint(1, 100) for _ in range(101)]
    for world_size in (1, 2, 3, 4, 7, 200):
        shares = assign(costs, world_size)
        assert sorted(item for share in shares for item in share) == list(range(len(costs)))
        loads = [sum(costs[item] for item in share) for share in shares]
        assert max(loads) - min(loads) <= max(costs)
        assert all(
            [costs[i] for i in s] == sorted((costs[i] for i in s), reverse=True) for s in shares
        )
    assert assign(costs, 3) == assign(list(costs), 3)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("batch", "reuse"), [(1, True), (4, False), (16, True)])
@pytest.mark.seconds
def test_answers_do_not_depend_on_ranks_batches_or_reuse(
    ask: Ask,
    expected: dict[str, WrittenAnswer],
    tmp_path: Path,
    world_size: int,
    batch: int,
    reuse: bool,
) -> None:
    for rank in range(world_size):
        ask(tmp_path, rank=rank, world_size=world_size, batch=batch, reuse_media=reuse)
    assert read(tmp_path) == expected
    assert len(list((tmp_path / TASK / ANSWERS).glob("*.jsonl"))) == world_size
    assert ask(tmp_path).prompts == 0  # nothing is left


@pytest.mark.seconds
def test_a_request_to_stop_ends_it_after_a_batch_and_an_older_one_does_not(
    ask: Ask,
    expected: dict[str, WrittenAnswer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, request = AnswerWriter.write, tmp_path / "stop"

    def write_and_ask(writer: AnswerWriter, answers: Any) -> None:
        write(writer, answers)
        request.touch()
        os.utime(request, (time.time() + 1,) * 2)

    monkeypatch.setattr(AnswerWriter, "write", write_and_ask)
    with pytest.raises(StoppedError) as stopped:
        ask(tmp_path, batch=4)
    assert stopped.value.exit_code == 75 and len(read(tmp_path)) == 4
    monkeypatch.setattr(AnswerWriter, "write", write)
    os.utime(request, (time.time() - 60,) * 2)
    ask(tmp_path, batch=4)
    assert read(tmp_path) == expected


def start(ask: Ask, out: Path, rank: int, world_size: int) -> int:
    """A rank as a process of its own: a copy of this one, with its model."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        torch.set_num_threads(1)  # OpenMP's threads stay with the parent: a child waits for ever
        ask(out, rank=rank, world_size=world_size, batch=1)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def count_lines(out: Path) -> int:
    return sum(p.read_bytes().count(b"\n") for p in (out / TASK / ANSWERS).glob("*.jsonl"))


def kill_and_resume(ask: Ask, root: Path, kills: int, seed: int) -> list[Path]:
    """Kill all ranks after a random number of answers, and start another number of them.

    Every kill counts that ends ranks while questions are left. Where none is, another evaluation
    begins; returns the folders of all. A rank that fails by itself ends the test.
    """
    rng, struck, failed, folders = random.Random(seed), 0, False, [root / "0"]
    while struck < kills:
        if count_lines(folders[-1]) >= COUNT:
            folders.append(root / str(len(folders)))
        out = folders[-1]
        world_size = rng.choice((1, 2, 4))
        wanted = count_lines(out) + rng.choice((0, 1, 1, 2))
        ranks = [start(ask, out, rank, world_size) for rank in range(world_size)]
        deadline = time.monotonic() + 300
        running = set(ranks)
        while running and count_lines(out) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
            ended = dict(os.waitpid(rank, os.WNOHANG) for rank in running)
            running -= ended.keys()
            failed |= any(ended.values())
        late = time.monotonic() >= deadline
        for rank in running:
            os.kill(rank, signal.SIGKILL)
            failed |= os.waitpid(rank, 0)[1] not in (0, signal.SIGKILL)
        assert not failed, "a rank failed; its traceback is above"
        assert not late, "a rank hangs"
        struck += bool(running) and count_lines(out) < COUNT
        if rng.random() < 0.5:  # what a kill within a write leaves
            for path in sorted((out / TASK / ANSWERS).glob("*.jsonl"))[-1:]:
                with path.open("ab") as file:
                    file.write(b'{"id": "existence/0000-0", "pro')
    return folders


@pytest.mark.parametrize(
    "kills", [pytest.param(5), pytest.param(20, marks=pytest.mark.soak)], ids=["5", "20"]
)
def test_kills_lose_nothing_and_repeat_nothing(
    ask: Ask, expected: dict[str, WrittenAnswer], tmp_path: Path, kills: int
) -> None:
    for out in kill_and_resume(ask, tmp_path, kills, seed=kills):
        for rank in range(3):
            ask(out, world_size=3, rank=rank)
        assert read(out) == expected  # read_answers refuses what is answered twice


def test_a_rank_that_fails_ends_the_kills(tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> BatchStatistics:
        raise UsageError("an answer is torn", "it was killed.", "nothing.")

    with pytest.raises(AssertionError, match="a rank failed"):
        kill_and_resume(fail, tmp_path, kills=3, seed=0)


@pytest.mark.seconds
def test_a_torn_line_is_asked_again(
    ask: Ask, expected: dict[str, WrittenAnswer], tmp_path: Path
) -> None:
    ask(tmp_path)
    (path,) = (tmp_path / TASK / ANSWERS).glob("*.jsonl")
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    assert len(read(tmp_path)) == COUNT - 1
    assert ask(tmp_path).prompts == 1
    assert read(tmp_path) == expected


def test_damage_within_a_file_and_double_and_unknown_answers_are_refused(
    ask: Ask, tmp_path: Path
) -> None:
    ask(tmp_path)
    folder = tmp_path / TASK / ANSWERS
    (path,) = folder.glob("*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0][:-9] + b"\n" + b"".join(lines[1:]))
    with pytest.raises(OneLLMError, match=r"line 1 is not an answer"):
        read(tmp_path)
    path.write_bytes(b"".join(lines))
    (folder / "other.jsonl").write_bytes(lines[3])
    name = json.loads(lines[3])["id"]
    with pytest.raises(UsageError, match=f"question {name} is answered in .* and in"):
        ask(tmp_path)
    (folder / "other.jsonl").write_bytes(lines[3].replace(name.encode(), b"strange"))
    with pytest.raises(UsageError, match="an answer to strange, which is not asked"):
        ask(tmp_path)


@pytest.mark.seconds
def test_answers_of_another_evaluation_are_not_mixed(ask: Ask, tmp_path: Path) -> None:
    ask(tmp_path, limit=3)
    assert len(read(tmp_path)) == 3
    with pytest.raises(UsageError, match=r"prompt: 'paper' there, 'short' now"):
        ask(tmp_path, prompt="short")
    with pytest.raises(UsageError, match="model: 'toy' there, 'other' now"):
        ask(tmp_path, identity="other")
    assert ask(tmp_path, limit=5).prompts == 2  # a limit may grow
    (settings,) = (json.loads(path.read_text()) for path in tmp_path.glob("**/task.json"))
    assert (settings["questions"], settings["split_questions"]) == (5, OFFICIAL)
    with pytest.raises(UsageError, match="which is not asked"):
        ask(tmp_path, limit=4)
    assert ask(tmp_path).prompts == COUNT - 5


def test_a_part_of_a_benchmark_never_counts_as_all_of_it(ask: Ask, tmp_path: Path) -> None:
    ask(tmp_path)
    (score,) = scores = score_folder(tmp_path)
    assert score.describe_gaps() == "2,364 not asked (not in the dataset)"
    assert build_results(scores)["incomplete"][TASK]["of"] == OFFICIAL
    assert "(incomplete: 10 of 2,374 questions)" in format_scores(scores)
    write_scores(tmp_path, scores)
    assert not list((tmp_path / TASK).glob("*.txt")), "the file for its own program"


@pytest.mark.seconds
def test_the_references_decoding_is_repeatable_and_another(
    ask: Ask, expected: dict[str, WrittenAnswer], tmp_path: Path
) -> None:
    ask(tmp_path / "a", as_reference=True, limit=4, batch=4)
    ask(tmp_path / "b", as_reference=True, limit=4, batch=1)
    first, second = read(tmp_path / "a"), read(tmp_path / "b")
    assert first == second
    longest = max(answer.tokens for answer in expected.values())
    assert any(a.tokens > longest or a.answer != expected[i].answer for i, a in first.items())


def test_wrong_names_are_refused(ask: Ask, benchmark_data: DataOf, tmp_path: Path) -> None:
    for options, message in (
        ({"prompt": "loud"}, "task mme has no prompt 'loud'"),
        ({"format": "poem"}, "--format poem"),
        ({"format": "chat"}, "no chat template"),
        ({"split": "train"}, "has no split 'train'"),
    ):
        with pytest.raises(UsageError, match=message):
            ask(tmp_path, **options)
    with pytest.raises(UsageError, match=r"there is no mme-eval"):
        find_dataset(tmp_path, get_task(TASK))


def test_a_writer_never_appends_to_a_file_of_another_one(tmp_path: Path) -> None:
    answer = WrittenAnswer("1", "p", "a\nb ü", 3, "eos")
    with AnswerWriter(tmp_path) as first, AnswerWriter(tmp_path) as second:
        first.write([answer])
        second.write([])
    assert len(list((tmp_path / ANSWERS).glob("*"))) == 2
    assert read_answers(tmp_path) == {"1": answer}


def test_a_models_identity_changes_with_its_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"a" * 100)
    before = loading.identify_model(tmp_path)
    assert loading.identify_model(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"a" * 99 + b"b")
    changed = loading.identify_model(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert len({before, changed, loading.identify_model(tmp_path)}) == 3
