"""`data.validation.tasks`: kept checkpoints of a real run answer a benchmark, once each."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_runs import Runs
from typer.testing import CliRunner

from onellm_dist.cli import app, evaluate_run
from onellm_dist.cli.evaluate_run import answer_kept, list_left, list_options, load_run
from onellm_dist.common.errors import EXIT_FAILED, EXIT_PREEMPTED, UsageError
from onellm_dist.evaluation.evaluate import EvaluationOptions, evaluate_folder
from onellm_dist.evaluation.kept_checkpoints import list_recorded
from onellm_dist.launch.slurm.attempts import append_attempt, make_attempt
from onellm_dist.launch.slurm.job import SlurmJob
from onellm_dist.launch.slurm.script import render
from onellm_dist.launch.slurm.submit import make_job, make_kept_job
from onellm_dist.report.benchmark_scores import draw_benchmarks
from onellm_dist.report.records import read_records

pytest_plugins = ("benchmark_fixtures",)


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, benchmark_data: Callable[[str], Path]
) -> Path:
    """A run of five steps that keeps every second checkpoint."""
    section = f"{{split: test_seen, samples: 2, every: 5, tasks: [mme], tasks_limit: 8, \
tasks_data: {benchmark_data('mme')}}}"
    runs = Runs(tmp_path_factory.mktemp("runs"), ("image",), 16)
    return runs.run(
        "kept",
        1,
        train__steps=5,
        data__global_batch=2,
        data__validation=section,
        checkpoint__every=1,
        checkpoint__keep=1,
        checkpoint__keep_every=2,
    )


def read_lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]


Arguments = list[list[str]]


def replace_ranks(monkeypatch: pytest.MonkeyPatch, preempted: int) -> Arguments:
    """Answer as the local ranks would, in this process; one start is preempted half-way.

    Returns:
        The arguments of each start.
    """
    started: Arguments = []

    def evaluate(arguments: list[str], ranks: int, out: Path) -> int:
        started.append(arguments)
        options = EvaluationOptions(limit=8, any_count=True, batch=1, format="raw")
        if len(started) == preempted:
            options = replace(options, rank=0, world_size=2)
        data = Path(arguments[arguments.index("--data") + 1])
        evaluate_folder(Path(arguments[0]), ["mme"], data, out, options, None)
        return EXIT_PREEMPTED if len(started) == preempted else 0

    monkeypatch.setattr(evaluate_run, "_start_evaluate", evaluate)
    return started


@pytest.mark.slow
def test_kept_checkpoints_answer_once_and_an_interruption_costs_no_answer(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = replace_ranks(monkeypatch, preempted=2)
    names = [left.name for left in list_left(finished)]
    assert [name[:13] for name in names] == ["step-00000002", "step-00000004", "step-00000005"]
    assert answer_kept(finished, 1) == EXIT_PREEMPTED
    assert [left.name for left in list_left(finished)] == names[1:]
    assert answer_kept(finished, 1) == 0 and not list_left(finished)
    assert len(started) == 4 and started[1] == started[2], "the model was not converted again"
    assert answer_kept(finished, 1) == 0 and len(started) == 4
    model, *rest = started[0]
    data, out = str(load_run(finished)[1].tasks_data), str(finished / "evaluation" / names[0])
    assert model == f"{out}/model"
    assert rest == ["mme", "--data", data, "--out", out, "--any-count", "--limit", "8"]

    lines = read_lines(finished)
    assert [line["steps_done"] for line in lines] == [5, 2, 4, 5] and "loss" in lines[0]
    for name, line in zip(names, lines[1:], strict=True):
        scores = line["tasks"]["mme"]["perception"]
        assert scores["low"] <= scores["value"] <= scores["high"] and scores["n"] > 0
        assert line["incomplete"] == {"mme": {"answered": 8, "of": 2374}}
        folder = finished / "evaluation" / name
        assert (folder / "report.html").is_file() and not (folder / "model").exists()
    assert list_recorded(finished) == {name: {"mme"} for name in names}

    board = EventAccumulator(str(finished / "tensorboard"))
    board.Reload()
    charts = board.Scalars("tasks/mme/perception")
    assert [chart.step for chart in charts] == [1, 3, 4]
    assert charts[0].value == pytest.approx(lines[1]["tasks"]["mme"]["perception"]["value"])
    (share, *_) = board.Scalars("tasks/mme/answered")
    assert share.value == pytest.approx(8 / 2374)
    page = "".join(draw_benchmarks(read_records(finished).validation))
    assert "mme: perception" in page and page.count("<tr>") == 4
    assert page.count("] (incomplete: 8 of 2,374)</td>") == page.count("[")

    check = CliRunner().invoke(app, ["evaluate-run", str(finished), "--check"])
    assert check.exit_code == EXIT_FAILED
    with (finished / "validation.jsonl").open("a") as file:
        file.write('{"steps_do')  # a kill
    assert list_recorded(finished).keys() == set(names)


@pytest.mark.slow
def test_a_new_task_is_asked_and_a_kill_leaves_no_model_for_ever(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = replace_ranks(monkeypatch, preempted=0)
    assert answer_kept(finished, 1) == 0
    path, before = finished / "validation.jsonl", len(started)
    lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
    name = json.loads(lines[2])["checkpoint"]
    lines[2] = lines[2].replace('"mme"', '"gqa"')
    path.write_text("".join(f"{line}\n" for line in lines))
    (left,) = list_left(finished)
    assert left.name == name and left.tasks == ["mme"]

    def kill(_: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate_run, "shutil", SimpleNamespace(rmtree=kill))
        with pytest.raises(KeyboardInterrupt):
            answer_kept(finished, 1)
    assert list_recorded(finished)[name] == {"gqa", "mme"}
    folder = finished / "evaluation" / name
    assert (folder / "model.answered").is_dir() and not (folder / "model").exists()
    assert answer_kept(finished, 1) == 0 and len(started) == before + 1
    assert not list(folder.glob("*model*"))
    page = "".join(draw_benchmarks(read_records(finished).validation))
    assert page.count("<tr>") == 4 and "gqa: perception" in page and "mme: perception" in page


def write_recipe(run: Path, tasks: str, data: Path, text_format: str = "caption") -> None:
    run.mkdir()
    (run / "config.yaml").write_text(
        "model: {preset: toy}\n"
        f"data: {{mixture: [{{path: image}}], global_batch: 2, text_format: {text_format}, "
        f"validation: {{split: a, samples: 1, every: 1, tasks: {tasks}, tasks_data: {data}}}}}\n"
        "train: {stage: align, steps: 1}\noptim: {lr: 1.0}\n"
    )


def test_what_cannot_be_answered_is_refused_and_ends_the_job(tmp_path: Path) -> None:
    def ask(run: Path) -> UsageError:
        found = CliRunner().invoke(app, ["evaluate-run", str(run)])
        assert isinstance(found.exception, UsageError)
        return found.exception

    assert "not a run directory" in str(ask(tmp_path))
    write_recipe(tmp_path / "none", "[]", tmp_path)
    assert "tasks is empty" in str(ask(tmp_path / "none"))
    write_recipe(tmp_path / "unknown", "[gqaa]", tmp_path)
    assert "unknown task 'gqaa'" in str(ask(tmp_path / "unknown"))
    run = tmp_path / "run"
    write_recipe(run, "[gqa]", tmp_path)
    append_attempt(run / "evaluation", make_attempt({}))  # begun by a job script
    assert "there is no gqa-eval" in str(ask(run))
    (line,) = (run / "evaluation" / "refusals.jsonl").read_text().splitlines()
    assert json.loads(line)["status"] == "usage"


@pytest.fixture
def outside_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("outside_of_jobs")
@pytest.mark.parametrize(
    ("trained", "asked"),
    [("chat", "chat"), ("conversation", "conversation"), ("caption", "conversation")],
)
def test_questions_have_the_form_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str, asked: str
) -> None:
    write_recipe(tmp_path / "run", "[mme]", tmp_path, trained)
    given: list[Any] = []

    def evaluate(*arguments: Any) -> str:
        given.extend(arguments)
        return ""

    monkeypatch.setattr("onellm_dist.evaluation.evaluate.evaluate_folder", evaluate)
    arguments = ["m", "mme", "--out", str(tmp_path), *list_options(*load_run(tmp_path / "run"))]
    done = CliRunner().invoke(app, ["evaluate", *arguments])
    assert done.exit_code == 0, done.output
    (options,) = (each for each in given if isinstance(each, EvaluationOptions))
    assert options.format == asked and options.any_count and options.limit is None


@pytest.mark.usefixtures("outside_of_jobs")
def test_tasks_are_looked_for_before_the_training(tmp_path: Path) -> None:
    write_recipe(tmp_path / "run", "[gqa]", tmp_path)
    found = CliRunner().invoke(app, ["train", str(tmp_path / "run" / "config.yaml")])
    assert isinstance(found.exception, UsageError) and "gqa-eval" in str(found.exception)


def test_the_job_script_submits_one_job_for_what_is_left(tmp_path: Path) -> None:
    job = SlurmJob("x", tmp_path, (2, 2), 8, 8, evaluates=True, python="python")
    text, own = render(job), render(make_kept_job(job, tmp_path))
    for script in (text, own):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    assert text.index("after begin") < text.index("evaluate-run --check") < text.index("srun ")
    assert text.index("status=$?") < text.index("# The time after") < text.index("after end")
    assert "evaluate-run" not in render(replace(job, evaluates=False))
    assert f"onellm_dist.cli.evaluate_run {tmp_path} --ranks 8 &" in own
    assert "#SBATCH --nodes=1\n" in own and f"run_dir={tmp_path}/evaluation\n" in own
    assert "--ntasks-per-node=1 " in own and "--gpus-per-node=8" in own
    assert f"--job-name=evaluate-{tmp_path.name}" in own and "--tasks" not in own

    begin, end = text.index("# Checkpoints that are kept"), text.index("# Launchers do not")
    made_up = "|| submit_evaluation\n"
    define = text[begin : text.index(made_up) + len(made_up)]
    submit = text[text.index("# The time after a request") : end]
    (tmp_path / "evaluation.sbatch").touch()
    wanted = f"sbatch --dependency=singleton {tmp_path}/evaluation.sbatch\n"

    def run(left: int, restart: int, stopped: int) -> int:
        """How often the job is submitted by a start."""
        shell = (
            f"python() {{ return {1 - left}; }}; sbatch() {{ echo sbatch $*; }}; "
            f"run_dir={tmp_path}; stop_asked={stopped}; SLURM_RESTART_COUNT={restart}"
        )
        done = subprocess.run(
            ["bash", "-uc", f"{shell}\n{define}\n{submit}"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert not done.stderr and done.stdout == wanted * done.stdout.count("sbatch --")
        return done.stdout.count(wanted)

    assert [run(left, 0, 0) for left in (0, 1)] == [0, 1]
    assert run(1, 0, 99) == 0, "it takes the time in which the job must be requeued"
    assert [run(left, 1, 99) for left in (0, 1)] == [0, 1], "the next start makes up for it"


def test_launch_writes_both_scripts(tmp_path: Path) -> None:
    write_recipe(tmp_path / "run", "[gqa]", tmp_path)
    recipe, out = str(tmp_path / "run" / "config.yaml"), str(tmp_path / "job.sbatch")
    arguments = ["launch", recipe, "--set", f"run.dir={tmp_path / 'new'}", "--out", out]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "evaluate-run --check" in Path(out).read_text()
    assert "evaluate_run" in (tmp_path / "new" / "evaluation.sbatch").read_text()
    assert "evaluate-run" not in done.output

    # Where no job is written for the tasks, it is said.
    printed = CliRunner().invoke(app, [*arguments[:-2], "--array", "run.seed=0,1"])
    for number in (0, 1):
        assert f"onellm evaluate-run {tmp_path / 'new'}/run.seed={number}" in printed.stderr
    assert "evaluate-run" not in printed.stdout.replace("cli evaluate-run --check", "")
    cloud = [
        *("--to", "kubernetes", "--container", "i", "--volume", "v:/data"),
        *("--set", "run.dir=/data/new", "--set", "data.root=/data"),
    ]
    manifest = CliRunner().invoke(app, ["launch", recipe, *cloud])
    assert manifest.exit_code == 0, manifest.output
    assert "onellm evaluate-run /data/new" in manifest.stderr
    assert "evaluate-run" not in manifest.stdout
    write_recipe(tmp_path / "unknown", "[gqaa]", tmp_path)
    unknown = ["launch", str(tmp_path / "unknown" / "config.yaml"), *cloud]
    assert "gqaa" in str(CliRunner().invoke(app, unknown).exception)


def test_a_container_sees_the_datasets_of_the_tasks(tmp_path: Path) -> None:
    write_recipe(tmp_path / "run", "[gqa]", tmp_path / "tasks")
    job = make_job(tmp_path / "run" / "config.yaml", [], nodes="1", container="image")
    assert str(tmp_path / "tasks") in job.mounts
    assert make_kept_job(job, tmp_path).mounts == job.mounts
