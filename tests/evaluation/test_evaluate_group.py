"""`onellm evaluate --group`: ranks that hold one model together answer as one rank does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from adapter_folders import save_adapter, save_base
from typer.testing import CliRunner
from zygote import Start, get_zygote

from onellm_dist.cli import app
from onellm_dist.common.errors import UsageError
from onellm_dist.evaluation.answer_folder import WrittenAnswer, read_answers
from onellm_dist.evaluation.evaluate import EvaluationOptions, evaluate_folder
from onellm_dist.evaluation.question_format import QuestionFormat
from onellm_dist.model.presets import load_toy_tokenizer

pytest_plugins = ("benchmark_fixtures",)
SCRIPT = Path(__file__).with_name("group_ranks.py")
TASK, COUNT = "mme", 10
HELD = re.compile(r"holds ([\d,]+) of ([\d,]+) weights")
Begin = Callable[..., Start]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base"
    save_base(folder)
    return folder


@pytest.fixture
def begin(base: Path, benchmark_data: Callable[[str], Path], tmp_path: Path) -> Begin:
    def start(
        world_size: int, *more: str, fault: str = "none", rank: int | str = 0, out: str = "out"
    ) -> Start:
        arguments = ["evaluate", str(base), TASK, "--data", str(benchmark_data(TASK))]
        arguments += ["--out", str(tmp_path / out), "--format", "raw", "--any-count", *more]
        script = [str(SCRIPT), fault, str(rank), *arguments]
        return get_zygote().start(world_size, [], script=script)

    return start


def read_logs(start: Start) -> list[str]:
    paths = [Path(f"{start._logs}-{rank}.log") for rank in range(len(start.pids))]
    return [path.read_text() for path in paths]


def read_held(logs: Sequence[str]) -> Iterator[tuple[int, int]]:
    for text in logs:
        found = HELD.search(text)
        assert found is not None, text
        yield int(found[1].replace(",", "")), int(found[2].replace(",", ""))


@pytest.mark.slow
def test_a_group_answers_as_one_rank_and_others_outlive_it(
    base: Path, begin: Begin, benchmark_data: Callable[[str], Path], tmp_path: Path
) -> None:
    options = EvaluationOptions(format="raw", any_count=True, batch=1)
    evaluate_folder(base, [TASK], benchmark_data(TASK), tmp_path / "alone", options, None)
    expected = read_answers(tmp_path / "alone" / TASK)
    assert len(expected) == COUNT and len({a.answer for a in expected.values()}) > 2

    def read(out: str = "out") -> dict[str, WrittenAnswer]:
        return read_answers(tmp_path / out / TASK)

    # Two ranks, of which the second one computes and draws noise, take the first one's tokens.
    drawn = replace(options, as_reference=True, limit=4)
    evaluate_folder(base, [TASK], benchmark_data(TASK), tmp_path / "alone-drawn", drawn, None)
    more = ["--as-reference", "--limit", "4", "--batch", "4"]
    start = begin(2, "--group", "2", *more, fault="noise", rank=1, out="drawn")
    assert start.wait() == [0, 0], read_logs(start)
    assert read("drawn") == read("alone-drawn") and len(read("drawn")) == 4
    form = QuestionFormat(load_toy_tokenizer(), "raw")
    took = re.findall(r"^took ([\d ]+)$", read_logs(start)[1], re.MULTILINE)
    texts = [form.decode([int(token) for token in tokens.split()]) for tokens in took]
    assert sorted(texts) == sorted(answer.answer for answer in read("drawn").values())
    (first, whole), (second, _) = read_held(read_logs(start))
    assert first + second == whole and whole / 2 <= first < whole * 0.51  # rows are not cut
    # Of two groups one loses a rank in its second batch; the other one answers all of its own.
    start = begin(4, "--group", "2", "--batch", "1", fault="kill", rank=3)
    codes, logs = start.wait(), read_logs(start)
    assert codes[:2] == [0, 0] and codes[2] == 1 and codes[3] == -9, (codes, logs)
    assert "another one is gone" in logs[2]
    assert "holds" in logs[0] and 4 < len(read()) < COUNT
    # Another number of ranks, in a group of another size, answers the rest.
    start = begin(3, "--group", "3")
    assert start.wait() == [0, 0, 0], read_logs(start)
    assert read() == expected
    assert not list((tmp_path / "out").glob("group*"))
    # What the first rank refuses ends the others as it does.
    start = begin(2, "--group", "2", "--prompt", "short")
    assert start.wait() == [2, 2], read_logs(start)
    assert "the first rank of the group ended" in read_logs(start)[1]


@pytest.mark.slow
def test_a_first_rank_that_fails_or_is_asked_to_stop_ends_its_group(
    begin: Begin, tmp_path: Path
) -> None:
    # Inside a batch, where the other one waits in the model: both end at once.
    start = begin(2, "--group", "2", "--batch", "1", fault="fail")
    assert start.wait(120) == [1, 1], read_logs(start)
    first, second = read_logs(start)
    assert "this rank of the group or another one is gone or failed (RuntimeError)" in first
    assert "this rank of the group or another one is gone or failed" in second
    assert len(read_answers(tmp_path / "out" / TASK)) == 1
    # While the model loads; and media may be read for longer than a collective waits.
    start = begin(2, "--group", "2", "--batch", "4", fault="stop", rank="all")
    assert start.wait(120) == [75, 75], read_logs(start)
    assert "asked to stop" in read_logs(start)[1]
    assert len(read_answers(tmp_path / "out" / TASK)) == 5
    assert not list((tmp_path / "out").glob("group*"))


@pytest.mark.seconds
def test_ranks_that_make_no_groups_and_adapters_are_refused(base: Path, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", base, seed=1)
    beside = ["--adapter", f"a={tmp_path / 'adapter'}"]
    for model, more, message in (
        (base, ["--ranks", "3"], "--group 2 with 3 ranks"),
        (base, [], "--group 2 with 1 rank"),
        (base, ["--ranks", "2", *beside], "--group with the adapter"),
        (tmp_path / "adapter", ["--ranks", "2"], "--group with the adapter"),
    ):
        arguments = ["evaluate", str(model), TASK, "--out", str(tmp_path / "out")]
        found = CliRunner().invoke(app, [*arguments, "--group", "2", *more])
        assert isinstance(found.exception, UsageError), found
        assert message in str(found.exception)
    assert not (tmp_path / "out").exists()
