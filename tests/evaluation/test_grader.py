"""Scores by another model: a real HTTP server in its place, replies that cannot be read, keys."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from onellm_dist.cli import app
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.evaluation.answer_folder import AnswerWriter, WrittenAnswer, write_task
from onellm_dist.evaluation.grader import Grader, grade_task
from onellm_dist.evaluation.grades import GRADES
from onellm_dist.evaluation.questions import BenchmarkQuestion, GivenAnswer
from onellm_dist.evaluation.score import build_results, score_task, write_scores
from onellm_dist.evaluation.tasks import get_task
from onellm_dist.evaluation.tasks.grading import (
    ask_mmvet,
    ask_object,
    read_mmvet,
    read_object,
)

KEY = "private-key-0123456789"
VARIABLE = "OPENAI_API_KEY"
Reply = Callable[[dict[str, Any]], tuple[int, Any]]


@contextmanager
def serve(reply: Reply) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server of chat completions; yields its address and what it was asked."""
    asked: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**body, "path": self.path, "key": self.headers["Authorization"]})
            status, text = reply(body)
            message = {"role": "assistant", "content": text}
            content: dict[str, Any] = {"error": {"message": text}}
            if status == 200 and isinstance(text, str):
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                content = {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": [choice],
                }
            # bytes are all of the response
            data = text if isinstance(text, bytes) else json.dumps(content).encode()
            self.send_response(status)
            kind = "text/html" if data.startswith(b"<") else "application/json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, KEY)
    questions = [
        BenchmarkQuestion(
            f"v1_{i}",
            f"What is {i}?",
            answers=[f"{i}<AND>more"],
            labels={"capabilities": ("math", "ocr")[i % 2]},
            extra={"key": f"v1_{i}"},
        )
        for i in range(6)
    ]
    settings = {
        "task": "mmvet",
        "split": "test",
        "prompt": "paper",
        "format": "raw",
        "as_reference": False,
        "model": "m",
        "questions": 6,
    }
    write_task(tmp_path / "mmvet", settings, questions)
    with AnswerWriter(tmp_path / "mmvet") as writer:
        writer.write(WrittenAnswer(q.id, q.text, f"it is {q.id}", 3, "eos") for q in questions)
    return tmp_path / "mmvet"


def grade_by_number(body: dict[str, Any]) -> tuple[int, str]:
    """0.2 for question 2, and so on."""
    last = body["messages"][0]["content"].splitlines()[-1]
    return 200, f"0.{last.split('?')[0][-1]} | because"


def test_every_answer_is_graded_once_and_the_score_needs_no_server(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = score_task(folder)
    assert before.measures == [] and "--grader" in before.missing["GPT-4 score"]
    with serve(grade_by_number) as (url, asked):
        grader = Grader(url, "gpt-4-0613", VARIABLE)
        assert grade_task(folder, grader) == 6 and len(asked) == 6
        assert grade_task(folder, grader) == 0 and len(asked) == 6
    assert {a["path"] for a in asked} == {"/v1/chat/completions"}
    assert {a["key"] for a in asked} == {f"Bearer {KEY}"} and asked[0]["temperature"] == 0
    row = next(a for a in asked if "v1_3" in a["messages"][0]["content"])["messages"][0]["content"]
    assert row.endswith("\nWhat is 3? | 3 <AND> more | it is v1_3 | ")
    score = score_task(folder)
    (measure,) = score.measures
    assert measure.name == "GPT-4 score" and measure.value == pytest.approx(25.0)
    assert {n: m.value for n, m in measure.split("capabilities").items()} == pytest.approx(
        {"math": 20.0, "ocr": 30.0}
    )
    assert not score.missing and build_results([score])["results"]["mmvet"]
    write_scores(folder.parent, [score])
    written = [p.read_text("utf-8") for p in folder.parent.rglob("*") if p.is_file()]
    assert not any(KEY in text for text in written) and KEY not in caplog.text


def test_another_model_has_a_score_of_its_own_name(folder: Path) -> None:
    with serve(grade_by_number) as (url, _):
        others = ["qwen", "gpt-4o", "gpt-4.1", "gpt-4-turbo", "gpt-4-1106-preview", "gpt-45"]
        for model in others:
            grade_task(folder, Grader(url, model))
        score = score_task(folder)
        assert [m.name for m in score.measures] == [f"score by {model}" for model in others]
        assert "GPT-4 score" in score.missing
        grade_task(folder, Grader(url, "openai/gpt-4"))
        assert score_task(folder).measures[-1].name == "GPT-4 score"
    with serve(lambda body: (200, "1.0")) as (url, _):
        grade_task(folder, Grader(url, "gpt-4-0613"))
    score = score_task(folder)
    assert not score.missing
    found = build_results([score])["results"]["mmvet"]
    assert found["GPT-4 score (openai/gpt-4),none"] == pytest.approx(25.0)
    assert found["GPT-4 score (gpt-4-0613),none"] == pytest.approx(100.0)


def test_a_reply_that_cannot_be_read_is_asked_for_again_and_never_counts_as_zero(
    folder: Path,
) -> None:
    tries: dict[str, int] = {}

    def reply(body: dict[str, Any]) -> tuple[int, str]:
        row = body["messages"][0]["content"].splitlines()[-1]
        tries[row] = tries.get(row, 0) + 1
        if "v1_1" in row and tries[row] < 3:
            return 200, "I would say half."
        if "v1_4" in row:
            return 200, "7"
        return 200, "1.0"

    with serve(reply) as (url, asked):
        assert grade_task(folder, Grader(url, "gpt-4")) == 5
        assert {a["temperature"] for a in asked if "v1_1" in str(a)} == {0.0, 0.5, 1.0}
        score = score_task(folder)
        assert score.measures == [] and "5 of 6" in score.missing["GPT-4 score"]
        before = len(asked)
        grade_task(folder, Grader(url, "gpt-4"))
        assert len(asked) == before + 3, "only the one that is missing is asked again"


def test_a_changed_answer_has_no_grade(folder: Path) -> None:
    with serve(grade_by_number) as (url, asked):
        grade_task(folder, Grader(url, "gpt-4"))
        (path,) = (folder / "answers").iterdir()
        path.write_text(path.read_text().replace("it is v1_2", "no idea"))
        assert "5 of 6" in score_task(folder).missing["GPT-4 score"]
        assert grade_task(folder, Grader(url, "gpt-4")) == 1 and len(asked) == 7


def test_a_server_that_refuses_keeps_what_was_graded_and_shows_no_key(folder: Path) -> None:
    def refuse(body: dict[str, Any]) -> tuple[int, str]:
        return 401, f"Incorrect API key provided: {KEY}"

    def half(body: dict[str, Any]) -> tuple[int, str]:
        row = body["messages"][0]["content"].splitlines()[-1]
        return refuse(body) if "v1_5" in row else (200, "1.0")

    with serve(refuse) as (url, _), pytest.raises(OneLLMError) as error:
        grade_task(folder, Grader(url, "gpt-4", VARIABLE))
    assert KEY not in str(error.value) and VARIABLE in str(error.value)
    with serve(half) as (url, _), pytest.raises(OneLLMError):
        grade_task(folder, Grader(url, "gpt-4"))
    with (folder / GRADES).open("ab") as file:
        file.write(b'{"id": "v1_5", "mod')  # a kill
    done = (folder / GRADES).read_bytes().count(b"\n")
    with serve(grade_by_number) as (url, asked):
        assert grade_task(folder, Grader(url, "gpt-4")) == 6 - done == len(asked)
    (folder / GRADES).write_bytes(b"{}\n" + (folder / GRADES).read_bytes())
    with pytest.raises(OneLLMError, match="line 1 is not a grade"):
        score_task(folder)


NO_COMPLETIONS = (
    b"<html>Welcome</html>",
    b'{"id": "x", "choices": [{"index": 0, "message": null}]}',
    b'{"id": "x", "choices": {"a": 1}}',
    b'{"id": "x", "choices": [{"index": 0, "message": {"content": [1]}}]}',
    b'"text"',
    b"{",
)


@pytest.mark.parametrize("content", NO_COMPLETIONS)
def test_a_reply_that_is_no_completion_keeps_what_was_graded(
    folder: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onellm_dist.evaluation.grader.PARALLEL", 1)

    def half(body: dict[str, Any]) -> tuple[int, Any]:
        if "v1_2" in str(body["messages"]):
            return 200, content
        time.sleep(0.05)
        return 200, "1.0"

    with serve(half) as (url, asked), pytest.raises(OneLLMError, match="no chat completion"):
        grade_task(folder, Grader(url, "gpt-4"))
    assert (folder / GRADES).read_bytes().count(b"\n") == len(asked) - 1 >= 2
    assert len(asked) < 6, "what waited was asked all the same"


@pytest.mark.parametrize("while_asking", [False, True])
def test_an_interruption_asks_nothing_more_and_keeps_what_is_paid_for(
    folder: Path, while_asking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it comes before all questions are in the queue."""
    monkeypatch.setattr("onellm_dist.evaluation.grader.PARALLEL", 2)
    if while_asking:
        submit = ThreadPoolExecutor.submit

        def submit_slowly(pool: ThreadPoolExecutor, *given: Any) -> Any:
            time.sleep(0.2)
            return submit(pool, *given)

        monkeypatch.setattr(ThreadPoolExecutor, "submit", submit_slowly)
    heard, once, main = threading.Event(), threading.Lock(), threading.get_ident()

    def stop(*_: Any) -> None:
        heard.set()
        raise KeyboardInterrupt

    def reply(body: dict[str, Any]) -> tuple[int, str]:
        if len(asked) >= 2 and once.acquire(blocking=False):
            signal.pthread_kill(main, signal.SIGINT)
        assert heard.wait(20)
        time.sleep(0.2)
        return grade_by_number(body)

    before = signal.signal(signal.SIGINT, stop)
    try:
        with serve(reply) as (url, asked), pytest.raises(KeyboardInterrupt):
            grade_task(folder, Grader(url, "gpt-4"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert 2 <= len(asked) < 6
    assert (folder / GRADES).read_bytes().count(b"\n") == len(asked)


def test_the_key_of_openai_is_sent_to_openai_alone(folder: Path) -> None:
    official = Grader("https://api.openai.com/v1", "m")
    assert official.find_key() == KEY
    for url in (
        "http://api.openai.com/v1",
        "https://api.openai.com.example.org/v1",
        "https://api.openai.com@example.org/v1",
        "https://example.org/api.openai.com",
        "http://127.0.0.1:1/v1",
    ):
        assert Grader(url, "m").find_key() == "", url
    for url in ("https://example.org/v1", "http://localhost:1/v1", "http://[::1]:1/v1"):
        assert Grader(url, "m", VARIABLE).find_key() == KEY
    for url in ("http://example.org/v1", "http://10.0.0.1/v1", "http://localhost.example.org"):
        assert Grader(url, "m", "NONE_SET").find_key() == ""
        with pytest.raises(UsageError, match="clear text") as error:
            Grader(url, "m", VARIABLE).find_key()
        assert KEY not in str(error.value)
    for url in ("https://", "http://[::1", "ftp://example.org"):
        with pytest.raises(UsageError, match="not an address"):
            Grader(url, "m").find_key()
    with serve(grade_by_number) as (url, asked):
        grade_task(folder, Grader(url, "m"))
    assert {a["key"] for a in asked} == {"Bearer none"}


def test_the_command_grades_and_refuses_what_makes_no_sense(folder: Path) -> None:
    def score(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["score", str(folder.parent), *arguments])

    with serve(grade_by_number) as (url, _):
        done = score("--grader", url, "--grader-model", "gpt-4", "--grader-key", "NONE_SET")
    assert done.exit_code == 0 and "GPT-4 score" in done.output and "25.0" in done.output
    assert isinstance(score("--grader", url).exception, UsageError)
    other = score("--grader", "localhost:8000", "--grader-model", "m")
    assert isinstance(other.exception, UsageError) and "address" in str(other.exception)


def test_prompts_and_replies_are_read_as_the_papers_programs_do() -> None:
    given = GivenAnswer(BenchmarkQuestion("a", "What?", answers=["x<OR>y"]), "z")
    prompt = ask_mmvet(given)
    assert prompt.count("Can you explain this meme?") == 2 and "| 0.4\n" in prompt
    assert prompt.endswith("\nWhat? | x <OR> y | z | ")
    assert [read_mmvet(r) for r in ("0.7", " 1.0 | good", "1.2", "half", "")] == [
        0.7,
        1.0,
        None,
        None,
        None,
    ]
    assert ask_object(given).endswith("Input: 1. x<OR>y 2. z\nOutput: ")
    assert [read_object(r) for r in ("T#Both", "F#No", " 'T'", "True", "maybe")] == [
        1.0,
        0.0,
        1.0,
        None,
        None,
    ]
    assert {n for n in ("mmvet", "objaverse-class") if get_task(n).grading} == {
        "mmvet",
        "objaverse-class",
    }
