"""A benchmark costs two files in the package: a task, and the source of its dataset.

Outside the package an entry point takes the place of each folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from added_file import added_file
from shard_worlds import write_tree
from source_checks import make_tone

from onellm_dist.common.errors import UsageError
from onellm_dist.evaluation import tasks
from onellm_dist.evaluation.answer_folder import AnswerWriter, WrittenAnswer, write_task
from onellm_dist.evaluation.benchmark_data import list_media
from onellm_dist.evaluation.score import score_task
from onellm_dist.evaluation.tasks import all_tasks, get_task
from onellm_dist.shards import build_dataset, open_dataset, sources
from onellm_dist.shards.build.registry import all_sources

BIRDSONG = """
from onellm_dist.evaluation.scorers.exact import measure_strict
from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.prompts import make_short

TASK = Task(
    "birdsong", "Birdsong", "Which bird sings.", ("audio",), "test", make_short(), measure_strict,
    max_new_tokens=4,
)
"""


BIRDSONG_EVAL = """
from onellm_dist.shards.sources.readers.benchmarks import BenchmarkRow, BenchmarkSet


def read(files):
    for i, (sound, bird) in enumerate(files.load_json("birds.json")):
        record = {"id": str(i), "text": "Which bird sings?", "answers": [bird]}
        yield BenchmarkRow(record, sound, {"audio": [sound]})


BIRDS = BenchmarkSet("birdsong", "birds.json and sounds", ("audio",), {"test": (4,)}, read)
SOURCE = BIRDS.make_source()
"""


def test_a_task_and_a_source_are_a_benchmark(tmp_path: Path) -> None:
    """One file in each folder: what they say is built, asked and scored."""
    known = set(all_tasks()), set(all_sources())
    birds = ["wren", "robin", "owl", "lark"]
    rows = [(f"{i}.wav", bird) for i, bird in enumerate(birds)]
    sounds = {name: make_tone("WAV", hertz=200.0 + 50 * i) for i, (name, _) in enumerate(rows)}
    inputs = write_tree(tmp_path / "in", {**sounds, "birds.json": json.dumps(rows)})
    out, asked = tmp_path / "out", tmp_path / "birdsong"
    added = tmp_path / "tasks", tmp_path / "sources"
    with (
        added_file(tasks, "birdsong", BIRDSONG, added[0], all_tasks.cache_clear),
        added_file(sources, "birdsong_eval", BIRDSONG_EVAL, added[1], all_sources.cache_clear),
    ):
        assert set(all_tasks()) - known[0] == {"birdsong"}
        assert set(all_sources()) - known[1] == {"birdsong-eval"}
        assert not build_dataset("birdsong-eval", inputs, out).failures
        task = get_task("birdsong")
        media = list_media(open_dataset(out), task, task.split, None)
        questions = [question for medium in media for question in medium.questions]
        assert [task.prompts["paper"](q).split("?")[0] for q in questions] == 4 * [
            "Which bird sings"
        ]
        write_task(asked, {"task": "birdsong", "questions": 4}, questions)
        with AnswerWriter(asked) as writer:
            writer.write(
                WrittenAnswer(q.id, "", "A wren" if q.id == "1" else q.answers[0], 1, "eos")
                for q in questions
            )
        assert score_task(asked).measures[0].value == 75.0
    assert (set(all_tasks()), set(all_sources())) == known


def test_another_package_adds_a_task_by_an_entry_point(tmp_path: Path) -> None:
    info = tmp_path / "birds-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: birds\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[onellm_dist.tasks]\nbirdsong = birds\n")
    (tmp_path / "birds.py").write_text(BIRDSONG)
    code = "from onellm_dist.evaluation.tasks import all_tasks; print(*all_tasks())"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "birdsong" in done.stdout.split() and len(done.stdout.split()) == 30


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"(?s)'smell'.*onellm_dist\.tasks.*gqa"):
        get_task("smell")
