"""Scorers against numbers of the official programs on recorded cases, differences by name.

`source` in each file of tests/fixtures/scorers says which program gave the numbers.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import savemat

from onellm_dist.evaluation.questions import BenchmarkQuestion, GivenAnswer
from onellm_dist.evaluation.scorers import exact, mmbench, people
from onellm_dist.evaluation.scorers.measure import Measure
from onellm_dist.evaluation.tasks import get_task
from onellm_dist.shards.sources.benchmark_signals import NYU_CLASSES, SUN_CLASSES, _read_rooms
from onellm_dist.shards.sources.readers.benchmarks import BenchmarkFiles

RECORDED = Path(__file__).parents[2] / "fixtures" / "scorers"


def load(name: str) -> Any:
    return json.loads((RECORDED / f"{name}.json").read_text())


def measure(task: str, answers: Iterable[GivenAnswer]) -> dict[str, Measure]:
    """The measures of a task, by name."""
    return {m.name: m for m in get_task(task).measure(list(answers))}


def split_values(found: Measure, table: str) -> dict[str, float]:
    return {name: part.value for name, part in found.split(table).items()}


def test_mme_is_that_of_calculation_py() -> None:
    recorded = load("mme")
    assert len(recorded["rows"]) == 110
    answers = [
        GivenAnswer(
            BenchmarkQuestion(
                str(i),
                row["question"],
                answers=[row["gold"]],
                labels={"task": row["task"]},
                extra={"file": row["picture"]},
                medium=f"{row['task']}/{row['picture']}",
            ),
            row["answer"],
        )
        for i, row in enumerate(recorded["rows"])
    ]
    found = measure("mme", answers)
    assert {name: m.value for name, m in found.items()} == pytest.approx(recorded["total"])
    tasks = {k: v for m in found.values() for k, v in split_values(m, "task").items()}
    assert tasks == pytest.approx(recorded["tasks"])
    assert len({round(v, 3) for v in tasks.values()}) > 5  # they differ


def test_mmbench_is_that_of_vlmevalkit_without_another_model() -> None:
    recorded = load("mmbench")
    rows = recorded["rows"]
    for row in rows:
        read = mmbench.read_vlmevalkit(row["prediction"], row["options"]).letter
        assert read == row["read"].replace("Z", ""), row
    assert {"A", "B", "C", "D", "Z", ""} == {row["read"] for row in rows}
    answers = [
        GivenAnswer(
            BenchmarkQuestion(
                str(row["index"]),
                options=row["options"],
                answers=[row["answer"]],
                labels={"category": row["category"]},
                extra={"group": row["index"] % 1_000_000},
            ),
            row["prediction"],
        )
        for row in rows
    ]
    found = measure("mmbench", answers)
    circular = found["CircularEval accuracy"]
    assert circular.value == pytest.approx(recorded["overall"])
    hits = dict(zip(circular.units, circular.rows[:, 0].tolist(), strict=True))
    assert hits == recorded["groups"]
    assert split_values(circular, "category") == pytest.approx(recorded["by category"])
    first = found["accuracy of the first order"]
    assert first.value == pytest.approx(recorded["first order"]) and first.value > circular.value


def test_gqa_is_that_of_its_eval_py_after_llavas_conversion() -> None:
    recorded = load("gqa")
    answers = [
        GivenAnswer(
            BenchmarkQuestion(
                str(i), answers=[row["gold"]], labels={"structural type": row["structural"]}
            ),
            row["answer"],
        )
        for i, row in enumerate(recorded["rows"])
    ]
    found = measure("gqa", answers)["accuracy"]
    assert found.value == pytest.approx(recorded["accuracy"], abs=0.005)
    parts = split_values(found, "structural type")
    assert parts == pytest.approx(recorded["by structural type"], abs=0.005)


def test_clotho_aqa_compares_texts_as_lmms_eval() -> None:
    """White space outside a text is nothing here, and an empty answer is never right."""
    differ = [("", ""), ("", ".")]
    for row in load("clotho_aqa")["strings"]:
        pair = row["answer"], row["reference"]
        assert people.is_same(*pair) == bool(row["exact"]) or pair in differ, row


def test_clotho_aqa_is_that_of_lmms_eval_and_of_aquanet() -> None:
    recorded = load("clotho_aqa")
    found = measure(
        "clotho-aqa",
        (
            GivenAnswer(BenchmarkQuestion(str(i), answers=row["people"]), row["answer"])
            for i, row in enumerate(recorded["questions"])
        ),
    )
    for name in ("majority", "unanimous"):
        own = found[f"exact match ({name})"]
        assert own.n == recorded[f"{name} n"]
        assert own.value == pytest.approx(recorded[name])
    for name in ("yes or no", "one word"):
        own = found[f"each person's answer ({name})"]
        assert own.value == pytest.approx(recorded[f"rows {name}"])
        interval = own.compute_interval()
        assert interval.low < own.value < interval.high


def test_music_avqa_is_that_of_its_test_program() -> None:
    recorded = load("music_avqa")
    rows = recorded["rows"]
    answers = [
        GivenAnswer(
            BenchmarkQuestion(
                str(i),
                answers=[row["gold"]],
                labels={"modality": row["type"][0], "type": " ".join(row["type"])},
            ),
            row["answer"],
        )
        for i, row in enumerate(rows)
    ]
    found = measure("music-avqa", answers)["accuracy"]
    assert found.value == pytest.approx(recorded["overall"])
    parts = split_values(found, "type") | split_values(found, "modality")
    assert len(parts) == 12 and parts == pytest.approx(recorded["parts"], abs=0.005)
    # what its classes cannot say: digits, which are words here, and names as they are written
    classes = recorded["classes"]
    assert not any(set("0123456789") & set(word) for word in classes)
    assert "acoustic_guitar" in classes
    assert exact.match_numbers("Acoustic guitar.", ["acoustic_guitar"])
    assert exact.match_numbers("2", ["two"]) and exact.match_numbers("11", ["more than ten"])


@pytest.mark.parametrize(
    ("name", "task", "classes"),
    [("nyuv2", "nyuv2-depth", NYU_CLASSES), ("sunrgbd", "sunrgbd-normal", SUN_CLASSES)],
)
def test_scenes_are_those_of_vitlens(
    name: str, task: str, classes: tuple[str, ...], tmp_path: Path
) -> None:
    recorded = load("scenes")[name]
    rows = recorded["rows"]
    answers = [
        GivenAnswer(
            BenchmarkQuestion(str(i), options=classes, answers=[row["class"]]), row["answer"]
        )
        for i, row in enumerate(rows)
    ]
    found = measure(task, answers)["accuracy"]
    assert found.rows[:, 0].astype(bool).tolist() == [row["right"] for row in rows]
    assert found.value == pytest.approx(recorded["accuracy"])
    assert set(classes) == set(recorded["counts"])
    assert sum(recorded["counts"].values()) == recorded["n"] == {"nyuv2": 654}.get(name, 4659)
    named = recorded["classes of scene.txt"]
    assert read_room_classes(tmp_path, name, named) == named


def read_room_classes(folder: Path, name: str, named: Mapping[str, str]) -> dict[str, str]:
    """What our source makes of rooms whose scene.txt has these names."""
    place = {"nyuv2": "kv1/NYUdata", "sunrgbd": "kv2/kinect2data"}[name]
    rooms = {f"{place}/{i:04}": scene for i, scene in enumerate(named)}
    for room, scene in rooms.items():
        (folder / room).mkdir(parents=True)
        (folder / room / "scene.txt").write_text(scene)
    cells = np.empty((1, len(rooms)), dtype=object)
    cells[0, :] = [f"/n/fs/sun3d/data/SUNRGBD/{room}" for room in rooms]
    out = io.BytesIO()
    savemat(out, {"alltest": cells})
    (folder / "allsplit.mat").write_bytes(out.getvalue())
    found = _read_rooms(BenchmarkFiles(folder, "test"), name, "depth")
    return {rooms[row.record["id"]]: row.record["answers"][0] for row in found}
