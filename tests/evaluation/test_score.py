"""`onellm score`: without torch, with what is missing said, in forms that other tools read."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.evaluation.answer_folder import (
    EXAMPLES,
    AnswerWriter,
    WrittenAnswer,
    name_picture,
    write_task,
)
from onellm_dist.evaluation.compare import compare_scores
from onellm_dist.evaluation.kept_checkpoints import build_entry, list_charts
from onellm_dist.evaluation.questions import BenchmarkQuestion, GivenAnswer
from onellm_dist.evaluation.score import (
    TaskScore,
    build_results,
    read_ids,
    score_folder,
    score_task,
    write_scores,
)
from onellm_dist.evaluation.score_page import format_differences, format_scores, write_score_page
from onellm_dist.evaluation.tasks import get_task
from onellm_dist.evaluation.tasks.answer_files import make_list_check
from onellm_dist.evaluation.tasks.mmbench_table import check_table, write_table
from onellm_dist.evaluation.tasks.mme_files import check_lists
from onellm_dist.report.benchmark_scores import draw_benchmarks

COUNT = 60
SETTINGS = {
    "split": "val",
    "prompt": "paper",
    "format": "raw",
    "as_reference": False,
    "model": "m",
    "questions": 1,
}


def write_evaluation(
    out: Path, right: float, *, task: str = "vqav2", seed: int = 0, answered: int = COUNT
) -> Path:
    """Answers to a task, of which a share is right."""
    questions = [
        BenchmarkQuestion(
            str(i),
            f"what is {i}?",
            answers=["red"] * 9 + ["blue"],
            labels={"answer type": ("other", "number")[i % 2]},
            extra={"question_id": i, "questionId": str(i)},
            medium=f"m{i // 2}",
        )
        for i in range(COUNT)
    ]
    settings = SETTINGS | {"task": task, "dataset": "d", "limit": None, "questions": COUNT}
    write_task(out / task, settings, questions)
    drawn = np.random.default_rng(seed).random(COUNT)
    with AnswerWriter(out / task) as writer:
        writer.write(
            WrittenAnswer(q.id, "prompt", "red" if drawn[i] < right else "a <b>", 2, "eos")
            for i, q in enumerate(questions[:answered])
        )
    (out / task / EXAMPLES).mkdir()
    picture = b"\x89PNG not really"
    (out / task / EXAMPLES / f"{name_picture('m1')}.png").write_bytes(picture)
    return out


def test_scores_files_and_page(tmp_path: Path) -> None:
    out = write_evaluation(tmp_path, 0.5)
    scores = score_folder(out)
    written = {path.relative_to(out).as_posix() for path in write_scores(out, scores)}
    assert written == {"results.json", "vqav2/samples.jsonl", "vqav2/vqav2.json"}
    measure = scores[0].measures[0]
    share = sum(json.loads(x)["accuracy"] for x in (out / "vqav2/samples.jsonl").open()) / COUNT
    assert measure.value == pytest.approx(100 * share) and 30 < measure.value < 70
    assert len(json.loads((out / "vqav2/vqav2.json").read_text())) == COUNT
    page = write_score_page(out, scores).read_text()
    assert "accuracy by answer type" in page and "71.6" in page
    assert page.count("<img") == 1
    wrong = write_evaluation(tmp_path / "wrong", 0.0)
    graded = write_score_page(wrong, score_folder(wrong)).read_text()
    assert '<p>a &lt;b&gt;</p><p class="dim">accuracy 0.0<br>reference: red' in graded
    exact = write_evaluation(tmp_path / "exact", 0.0, task="gqa")
    strict = write_score_page(exact, score_folder(exact)).read_text()
    assert '<p class="wrong">a &lt;b&gt;</p><p class="dim">reference: red' in strict
    table = format_scores(scores)
    assert "vqav2" in table and "71.6" in table and "ncomplete" not in table + page
    assert build_results(scores)["incomplete"] == {}


def test_results_have_the_form_of_lm_evaluation_harness(tmp_path: Path) -> None:
    out = write_evaluation(tmp_path, 0.5)
    results = build_results(score_folder(out))
    assert set(results) >= {
        "results",
        "configs",
        "versions",
        "n-shot",
        "higher_is_better",
        "n-samples",
    }
    values = results["results"]["vqav2"]
    assert values["alias"] == "vqav2"
    low, high = results["intervals"]["vqav2"]["accuracy"]
    assert low < values["accuracy,none"] < high
    assert high - low == pytest.approx(4 * values["accuracy_stderr,none"], rel=0.15)
    assert results["n-samples"]["vqav2"] == {"original": COUNT, "effective": COUNT}
    json.dumps(results)


def test_missing_answers_are_refused_unless_a_part_is_wanted(tmp_path: Path) -> None:
    out = write_evaluation(tmp_path, 1.0, answered=10)
    with pytest.raises(UsageError, match=r"50 of 60 questions have no answer \(10, \.\.\.\)"):
        score_folder(out)
    (score,) = score_folder(out, partial=True)
    assert score.measures[0].n == 10 and not score.is_complete
    assert "10 of 60 questions" in format_scores([score])
    write_scores(out, [score])
    assert not (out / "vqav2" / "vqav2.json").exists()  # a server wants all of them


def test_a_limit_makes_no_complete_score(tmp_path: Path) -> None:
    out = write_evaluation(tmp_path, 1.0)
    settings = json.loads((out / "vqav2" / "task.json").read_text())
    settings |= {"limit": COUNT, "split_questions": 1000, "dataset_questions": 1000}
    settings["readable_questions"] = 1000
    (out / "vqav2" / "task.json").write_text(json.dumps(settings))
    (score,) = scores = score_folder(out)
    assert "60 of 1,000 questions" in format_scores(scores) and not score.is_complete
    page = write_score_page(out, scores).read_text()
    assert "vqav2 (incomplete: 60 of 1,000 questions)" in page
    assert "<b>Incomplete: 60 of 1,000 questions.</b> 940 not asked (--limit 60)" in page
    results = build_results(scores)
    assert results["n-samples"]["vqav2"] == {"original": 1000, "effective": COUNT}
    assert results["incomplete"] == {
        "vqav2": {"answered": 60, "of": 1000, "why": "940 not asked (--limit 60)"}
    }
    write_scores(out, scores)
    assert not (out / "vqav2" / "vqav2.json").exists()

    entry = build_entry("step-00000002-0a1b2c3d", 2, scores, 1.0)
    assert entry["incomplete"] == {"vqav2": {"answered": 60, "of": 1000}}
    charts = list_charts(entry)
    assert charts["tasks/vqav2/answered"] == 0.06 and "tasks/vqav2/accuracy" in charts
    page = "".join(draw_benchmarks([entry]))
    assert "] (incomplete: 60 of 1,000)</td>" in page
    whole = score_folder(write_evaluation(tmp_path / "whole", 0.5))
    for pair in ((whole, scores), (scores, whole)):
        *_, last = format_differences(compare_scores(*pair)).splitlines()
        assert last == "vqav2 is incomplete: 60 of 1,000 questions"
    entry = build_entry("step-00000002-0a1b2c3d", 2, whole, 1.0)
    assert entry["incomplete"] == {} and "tasks/vqav2/answered" not in list_charts(entry)
    texts = ("".join(draw_benchmarks([entry])), format_differences(compare_scores(whole, whole)))
    assert not any("incomplete" in text for text in texts)


@pytest.mark.parametrize(
    ("changes", "answered", "without", "says"),
    [
        (
            {"split_questions": 1000},
            *(60, [], "940 not asked (not in the dataset, or media that could not be read)"),
        ),
        (
            {"split_questions": 1000, "dataset_questions": 1000, "limit": 60}
            | {"readable_questions": 1000},
            *(60, [], "940 not asked (--limit 60)"),
        ),
        (
            {"split_questions": 1000, "dataset_questions": 1000, "limit": 60},
            *(60, [], "940 not asked (--limit 60, or media that could not be read)"),
        ),
        (
            {"split_questions": 1000, "dataset_questions": 100, "limit": 60}
            | {"readable_questions": 90},
            *(
                60,
                ["3"],
                "30 not asked (--limit 60), 10 not asked (media that could not be read), "
                "900 not asked (not in the dataset), 1 left out",
            ),
        ),
        (
            {"split_questions": 1000, "dataset_questions": 60, "limit": 60},
            *(60, [], "940 not asked (not in the dataset)"),
        ),
        (
            {"split_questions": 1000, "dataset_questions": 70, "limit": 500},
            *(
                60,
                [],
                "10 not asked (media that could not be read), 930 not asked (not in the dataset)",
            ),
        ),
        (
            {"split_questions": 1000, "limit": 60},
            *(
                60,
                [],
                "940 not asked (--limit 60, or not in the dataset, "
                "or media that could not be read)",
            ),
        ),
        ({}, 50, ["7"], "1 left out, 10 without an answer (50, ...)"),
    ],
)
def test_a_servers_file_that_is_not_written_is_said_with_what_is_missing(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, int],
    answered: int,
    without: list[str],
    says: str,
) -> None:
    out = write_evaluation(tmp_path, 1.0, answered=answered)
    settings = json.loads((out / "vqav2" / "task.json").read_text())
    (out / "vqav2" / "task.json").write_text(json.dumps(settings | changes))
    written = write_scores(out, score_folder(out, partial=True, without=without))
    assert [path.name for path in written] == ["results.json", "samples.jsonl"]
    (record,) = caplog.records
    whole = f"{changes.get('split_questions', COUNT):,}"
    assert record.getMessage() == (
        f"vqav2: the file for its server is not written: of {whole} questions, {says}"
    )


def test_objaverses_file_has_the_prompt_that_was_asked(tmp_path: Path) -> None:
    asked = {"task": "objaverse-class", "split": "val200", "prompt": "completion"}
    settings = SETTINGS | asked | {"dataset": "d", "limit": None}
    folder = tmp_path / "objaverse-class"
    write_task(folder, settings, [BenchmarkQuestion("7", extra={"object_id": "7"})])
    with AnswerWriter(folder) as writer:
        writer.write([WrittenAnswer("7", "", "a chair", 1, "eos")])
    write_scores(tmp_path, [score_task(folder)])
    written = json.loads((folder / "objaverse.json").read_text())
    assert written["prompt"] == "This is an object of "


def test_the_page_says_how_a_score_differs_from_the_official_one(tmp_path: Path) -> None:
    for task, said in (("avsd", "stop words"), ("nocaps", "document frequencies")):
        score = TaskScore(get_task(task), tmp_path, SETTINGS, [], {}, [])
        assert said in write_score_page(tmp_path, [score]).read_text()


def test_questions_can_be_left_out(tmp_path: Path) -> None:
    out = write_evaluation(tmp_path, 0.5)
    (score,) = score_folder(out)
    wrong = [
        question.id for question in score.questions if score.answers[question.id].answer != "red"
    ]
    listed = tmp_path / "left-out.txt"
    listed.write_text("".join(f"vqav2/{key}\tdHash 3\n" for key in wrong) + "\n")
    (clean,) = score_folder(out, without=read_ids(listed))
    assert clean.left_out == len(wrong) and clean.measures[0].n == COUNT - len(wrong)
    assert clean.measures[0].value == pytest.approx(100 * score.measures[0].rows[:, 0].max())
    with pytest.raises(UsageError, match="No such file"):
        read_ids(tmp_path / "nothing")
    listed.write_bytes("vqav2/\xe9\n".encode("latin-1"))
    with pytest.raises(UsageError, match="not UTF-8"):
        read_ids(listed)


def test_two_evaluations_are_compared_question_by_question(tmp_path: Path) -> None:
    weak = score_folder(write_evaluation(tmp_path / "a", 0.3))
    strong = score_folder(write_evaluation(tmp_path / "b", 0.6))
    other = score_folder(write_evaluation(tmp_path / "c", 0.31))
    (found,) = compare_scores(weak, strong)
    assert found.is_clear and found.difference.low > 0
    assert found.difference.mean == pytest.approx(found.second - found.first)
    same = compare_scores(weak, weak)[0]
    assert (same.difference.low, same.difference.high, same.is_clear) == (0, 0, False)
    # paired: both draws have the same questions, so a few others cannot be a clear difference
    close = compare_scores(weak, other)[0]
    assert not close.is_clear and close.difference.high < 8
    assert "not clear" in format_differences([close, found])
    with pytest.raises(UsageError, match="no task in common"):
        compare_scores(weak, score_folder(write_evaluation(tmp_path / "d", 0.5, task="gqa")))
    part = score_folder(tmp_path / "b", without=["3"])
    with pytest.raises(UsageError, match=r"asked different questions \(3, \.\.\.\)"):
        compare_scores(weak, part)


def test_a_split_without_references_is_exported_alone(tmp_path: Path) -> None:
    settings = SETTINGS | {"task": "vqav2", "split": "test", "dataset": "d", "limit": None}
    questions = [BenchmarkQuestion("7", "what?", extra={"question_id": 7})]
    write_task(tmp_path / "vqav2", settings, questions)
    with AnswerWriter(tmp_path / "vqav2") as writer:
        writer.write([WrittenAnswer("7", "", "ball", 1, "eos")])
    score = score_task(tmp_path / "vqav2")
    assert not score.measures and "hidden" in score.missing["scores"]
    write_scores(tmp_path, [score])
    assert json.loads((tmp_path / "vqav2" / "vqav2.json").read_text()) == [
        {"question_id": 7, "answer": "ball"}
    ]


def test_rules_of_servers_find_what_breaks_them() -> None:
    check = make_list_check(question_id=int, answer=str)
    good = [{"question_id": 1, "answer": "x"}, {"question_id": 2, "answer": ""}]
    assert check("a.json", json.dumps(good).encode()) == []
    bad = [{"question_id": "1", "answer": "x"}, {"answer": "x"}, good[0], good[0]]
    problems = " ".join(check("a.json", json.dumps(bad).encode()))
    assert "question_id has another type" in problems and "repeats question_id 1" in problems
    assert "entry 1 has the keys ['answer']" in problems
    assert check("a.json", b"{") and check("a.json", b"{}")
    assert check_lists("a.txt", b"1.jpg\tq\tYes\tyes\n1.jpg\tr\tNo\tno\n") == []
    assert "are about" in check_lists("a.txt", b"1.jpg\tq\tYes\tyes\n2.jpg\tr\tNo\tno\n")[0]
    assert "3 fields" in check_lists("a.txt", b"1.jpg\tq\tYes\n")[0]
    assert "columns" in check_table("a.csv", b"index,prediction\n1,A\n")[0]


def test_texts_of_mmbenchs_table_are_no_formulas() -> None:
    openpyxl = pytest.importorskip("openpyxl")
    texts = ["=1+1", "#N/A", "A", "7", ""]
    answers = [
        GivenAnswer(BenchmarkQuestion(str(i), "=?", ("=a", "b"), extra={"index": i}), text)
        for i, text in enumerate(texts)
    ]
    ((name, content),) = write_table(answers).items()
    assert name == "mmbench.xlsx" and check_table(name, content) == []
    sheet = openpyxl.load_workbook(io.BytesIO(content), data_only=True).active
    rows = [[value or "" for value in row[1:]] for row in sheet.iter_rows(2, values_only=True)]
    assert rows == [["=?", "=a", "b", "", "", text] for text in texts]
    sheet["G2"] = "=1+1"
    changed = io.BytesIO()
    sheet.parent.save(changed)
    assert check_table(name, changed.getvalue()) == ["G2 is a formula: =1+1"]


def test_a_file_that_breaks_the_rules_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = write_evaluation(tmp_path, 0.5)
    scores = score_folder(out)
    task = scores[0].task
    object.__setattr__(task, "check_file", lambda name, content: ["it is too green"])
    try:
        with pytest.raises(OneLLMError, match="breaks the server's rules: it is too green"):
            write_scores(out, scores)
    finally:
        object.__setattr__(task, "check_file", make_list_check(question_id=int, answer=str))
    assert not (out / "vqav2" / "vqav2.json").exists()
    assert get_task("vqav2") is task


@pytest.mark.parametrize("arguments", [["--partial"], []])
def test_the_command_needs_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    if arguments:
        out = write_evaluation(tmp_path, 0.5, answered=20)
    else:
        out = write_evaluation(tmp_path, 0.5)
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'torchvision', 'scipy'):\n"
        "    sys.modules[name] = None\n"
        "from onellm_dist.cli import main\n"
        f"main({['score', str(out), *arguments]!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "vqav2" in done.stdout and (out / "report.html").is_file()


def test_a_folder_without_answers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no task has been evaluated there"):
        score_folder(tmp_path)
    write_evaluation(tmp_path, 0.5)
    with pytest.raises(UsageError, match="there are no answers to gqa"):
        score_folder(tmp_path, tasks=["gqa"])
