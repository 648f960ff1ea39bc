"""`onellm score`: scores of what was answered; it needs no model, no GPU and no torch.

OUT/results.json           scores in the form of lm-evaluation-harness
/report.html            the page
/mmvet/grades.jsonl     scores that another model gave (grader.py)
/gqa/samples.jsonl      every question with its answer and its own scores
/vqav2/vqav2.json       the file that the benchmark's server takes
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.logging import get_logger
from onellm_dist.evaluation.answer_folder import (
    WrittenAnswer,
    check_known,
    list_task_folders,
    read_answers,
    read_questions,
    read_settings,
)
from onellm_dist.evaluation.grades import measure_grades
from onellm_dist.evaluation.questions import BenchmarkQuestion, GivenAnswer
from onellm_dist.evaluation.scorers.coco_captions import NotComputedError
from onellm_dist.evaluation.scorers.measure import Measure
from onellm_dist.evaluation.tasks import Task, get_task

_log = get_logger(__name__)
RESULTS = "results.json"
SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class TaskScore:
    """The scores of one task."""

    task: Task
    folder: Path
    settings: Mapping[str, Any]
    questions: Sequence[BenchmarkQuestion]
    answers: Mapping[str, WrittenAnswer]
    measures: Sequence[Measure]
    missing: Mapping[str, str] = field(default_factory=dict)
    """Measure -> why it was not computed."""
    left_out: int = 0
    """Questions that `without` named."""

    @property
    def is_complete(self) -> bool:
        """Whether every question of the split was answered and scored."""
        return not self.describe_gaps()

    def describe_gaps(self) -> str:
        """What lacks of the split, for people; "" if every question was answered and scored."""
        lacking = [q.id for q in self.questions if q.id not in self.answers]
        gaps = [
            *(f"{count:,} not asked ({why})" for why, count in self._list_unasked() if count),
            f"{self.left_out:,} left out" if self.left_out else "",
            f"{len(lacking):,} without an answer ({lacking[0]}, ...)" if lacking else "",
        ]
        return ", ".join(gap for gap in gaps if gap)

    def _list_unasked(self) -> list[tuple[str, int]]:
        """Why questions of the split were not asked, and how many."""
        asked, limit = len(self.questions) + self.left_out, self.settings.get("limit")
        there, readable = (self.settings.get(f"{of}_questions") for of in ("dataset", "readable"))
        lost, unread, cut = "not in the dataset", "media that could not be read", f"--limit {limit}"
        if limit is None or asked < limit:
            cut, readable = "", asked
        if there is None:  # answered by an older version
            reasons = ", or ".join(filter(None, (cut, lost, unread)))
            return [(reasons, self.whole - asked)]
        there = max(there, asked)
        if readable is None:  # the limit left samples that nothing has read
            return [(f"{cut}, or {unread}", there - asked), (lost, self.whole - there)]
        readable = min(max(readable, asked), there)
        rest = [(unread, there - readable), (lost, self.whole - there)]
        return [(cut, readable - asked), *rest]

    def describe_part(self) -> str:
        """How many of the split's questions the scores are of, for people; "" if of all."""
        if self.is_complete:
            return ""
        return f"{len(self.answers):,} of {format_count(self.whole, 'question')}"

    @property
    def whole(self) -> int:
        """Questions of the split, also where --limit or the dataset lacks some."""
        return int(self.settings.get("split_questions", self.settings["questions"]))


def score_folder(
    out: Path, *, partial: bool = False, without: Collection[str] = (), tasks: Sequence[str] = ()
) -> list[TaskScore]:
    """Score all tasks below an output folder.

    Args:
        out: the output folder of `onellm evaluate`.
        partial: score what has been answered, although answers are missing.
        without: ids of questions that are left out, as `TASK/ID` or `ID`.
        tasks: these tasks alone; (): all.

    Raises:
        UsageError: there is none, answers are missing, or there are answers to unknown questions.
    """
    folders = list_task_folders(out)
    if unknown := sorted(set(tasks) - {folder.name for folder in folders}):
        raise UsageError(
            f"{out}: there are no answers to {unknown[0]}",
            f"there are answers to {', '.join(folder.name for folder in folders)}.",
            "name one of them.",
        )
    wanted = [folder for folder in folders if not tasks or folder.name in tasks]
    return [score_task(folder, partial=partial, without=without) for folder in wanted]


def score_task(folder: Path, *, partial: bool = False, without: Collection[str] = ()) -> TaskScore:
    """Score one task; see `score_folder`."""
    settings = read_settings(folder)
    task = get_task(settings["task"])
    questions, answers = read_questions(folder), read_answers(folder)
    check_known(folder, questions, answers)
    lacking = [q.id for q in questions if q.id not in answers]
    if lacking and not partial:
        raise UsageError(
            f"{folder}: {len(lacking):,} of {format_count(len(questions), 'question')} "
            f"{'has' if len(lacking) == 1 else 'have'} no answer "
            f"({lacking[0]}, ...)",
            "scores of a part cannot be compared.",
            "run the same `onellm evaluate` again, or score what is there: --partial.",
        )
    names = set(without)
    kept = [q for q in questions if q.id not in names and f"{task.name}/{q.id}" not in names]
    given = [GivenAnswer(q, answers[q.id].answer) for q in kept if q.id in answers]
    measures, missing = _measure(task, folder, given)
    return TaskScore(
        task,
        folder,
        settings,
        kept,
        {q.id: answers[q.id] for q in kept if q.id in answers},
        measures,
        missing,
        left_out=len(questions) - len(kept),
    )


def _measure(
    task: Task, folder: Path, given: Sequence[GivenAnswer]
) -> tuple[list[Measure], dict[str, str]]:
    missing = dict(task.missing())
    scored = [answer for answer in given if answer.question.answers]
    if not scored:
        return [], {**missing, "scores": "the references of this split are hidden, or none is left"}
    try:
        measures = task.measure(scored)
    except NotComputedError as error:
        return [], {**missing, "scores": str(error)}
    if task.grading is not None:
        graded, lacking = measure_grades(task.grading, folder, scored)
        return [*measures, *graded], {**missing, **lacking}
    return measures, missing


def write_scores(out: Path, scores: Sequence[TaskScore]) -> list[Path]:
    """Write results, samples and answer files.

    A task that lacks questions gets no answer file: its server would refuse it, or count them as
    wrong. A warning says what is missing.

    Raises:
        OneLLMError: an answer file breaks the rules of its server.
    """
    written = []
    for score in scores:
        written.append(_write_samples(score))
        written += _write_answer_files(score)
    results = json.dumps(build_results(scores), indent=1, sort_keys=True, ensure_ascii=False)
    write_atomic(out / RESULTS, results + "\n")
    return [out / RESULTS, *written]


def build_results(scores: Sequence[TaskScore]) -> dict[str, Any]:
    """Build the content of results.json in the form of lm-evaluation-harness.

    Scores are on the scale of the papers, mostly 0 to 100; `intervals` has the 95% intervals, and
    `incomplete` the tasks of which questions are missing.
    """
    results: dict[str, Any] = {}
    intervals: dict[str, dict[str, list[float]]] = {}
    for score in scores:
        values: dict[str, Any] = {"alias": score.task.name}
        for measure in score.measures:
            interval = measure.compute_interval()
            values[f"{measure.name},none"] = interval.mean
            values[f"{measure.name}_stderr,none"] = float(measure.draw().std(ddof=1))
            own = intervals.setdefault(score.task.name, {})
            own[measure.name] = [interval.low, interval.high]
        results[score.task.name] = values
    names = [score.task.name for score in scores]
    return {
        "results": results,
        "intervals": intervals,
        "configs": {
            s.task.name: {
                "task": s.task.name,
                "test_split": s.settings["split"],
                "output_type": "generate_until",
                "metadata": dict(s.settings),
            }
            for s in scores
        },
        "versions": dict.fromkeys(names, 1),
        "n-shot": dict.fromkeys(names, 0),
        "higher_is_better": {
            s.task.name: {measure.name: True for measure in s.measures} for s in scores
        },
        "n-samples": {
            s.task.name: {"original": s.whole, "effective": len(s.answers)} for s in scores
        },
        "incomplete": {
            s.task.name: {"answered": len(s.answers), "of": s.whole, "why": gaps}
            for s in scores
            if (gaps := s.describe_gaps())
        },
        "not-computed": {s.task.name: dict(s.missing) for s in scores if s.missing},
        "model_name": scores[0].settings["model"] if scores else "",
    }


def _write_samples(score: TaskScore) -> Path:
    own: dict[str, dict[str, float]] = {}
    for measure in score.measures:
        if measure.rows.shape[1:] == (2,):
            for unit, row in zip(measure.units, measure.rows, strict=True):
                own.setdefault(unit, {})[measure.name] = float(row[0] / row[1])
    lines = []
    for number, question in enumerate(score.questions):
        answer = score.answers.get(question.id)
        if answer is not None:
            sample = {
                "doc_id": number,
                "doc": question.to_json(),
                "target": list(question.answers),
                "arguments": [[answer.prompt]],
                "resps": [[answer.answer]],
                "filtered_resps": [answer.answer],
                "ended": answer.ended,
                **own.get(question.id, {}),
            }
            lines.append(json.dumps(sample, ensure_ascii=True))
    path = score.folder / SAMPLES
    write_atomic(path, "".join(f"{line}\n" for line in lines))
    return path


def _write_answer_files(score: TaskScore) -> list[Path]:
    task = score.task
    if task.answer_files is None:
        return []
    if gaps := score.describe_gaps():
        _log.warning(
            "%s: the file for its server is not written: of %s questions, %s",
            *(task.name, f"{score.whole:,}", gaps),
        )
        return []
    build = task.get_prompt(score.settings["prompt"])[1]
    given = [GivenAnswer(q, score.answers[q.id].answer, build(q)) for q in score.questions]
    written = []
    for name, content in task.answer_files(given).items():
        problems = task.check_file(name, content) if task.check_file else ()
        if problems:
            raise OneLLMError(
                f"{task.name}: {name} breaks the server's rules: {'; '.join(problems[:5])}",
                "the server would refuse it.",
                "this is a fault of the task's answer file: report it.",
            )
        write_atomic(score.folder / name, content)
        written.append(score.folder / name)
    return written


def read_ids(path: Path) -> frozenset[str]:
    """Read a list of ids of questions, one a line; what follows a tab is a remark.

    Raises:
        UsageError: there is no such file, or it is not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = "it is not UTF-8" if isinstance(error, ValueError) else error.strerror
        raise UsageError(
            f"{path}: {what}",
            "which questions are left out stands in it.",
            "`onellm shards overlap` writes such a list.",
        ) from None
    return frozenset(line.split("\t")[0].strip() for line in lines if line.strip())
