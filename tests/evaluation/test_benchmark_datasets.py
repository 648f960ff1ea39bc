"""Datasets of benchmarks: what their sources read and refuse, and the media of their questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from benchmark_trees import write_benchmark
from source_checks import make_photo

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.evaluation import benchmark_data
from onellm_dist.evaluation.benchmark_data import count_split, list_media, read_media
from onellm_dist.evaluation.evaluate import EvaluationOptions, evaluate_model
from onellm_dist.evaluation.score import score_task
from onellm_dist.evaluation.tasks import get_task
from onellm_dist.modalities import get_modality
from onellm_dist.model.generation.batched import generate_batch
from onellm_dist.shards import build_dataset
from onellm_dist.shards.build.registry import get_source
from onellm_dist.shards.format.dataset import open_dataset
from onellm_dist.shards.sources.base import RawSample

pytest_plugins = ("benchmark_fixtures",)
DataOf = Callable[[str], Path]


@pytest.mark.parametrize(("name", "whole"), [("music-avqa", 9_129), ("seedbench", 3)])
def test_a_part_is_of_the_official_number(name: str, whole: int, benchmark_data: DataOf) -> None:
    """The next one where there are two; what is there where there is none."""
    dataset = open_dataset(benchmark_data(name) / f"{name}-eval")
    assert count_split(dataset, "test", 0).whole == whole


@pytest.mark.parametrize(
    ("name", "split", "whole"),
    [("music-avqa", "test", 9_129), ("seedbench", "test", 3), ("mme", "x", 0)],
)
def test_the_source_knows_the_official_number_of_an_older_dataset(
    name: str,
    split: str,
    whole: int,
    benchmark_data: DataOf,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    dataset = open_dataset(benchmark_data(name) / f"{name}-eval")
    older = {k: v for k, v in dataset.manifest.attributes.items() if k != "official_questions"}
    monkeypatch.setattr(dataset, "manifest", replace(dataset.manifest, attributes=older))
    assert count_split(dataset, split, 0).whole == whole
    assert ["Build it again to know" in record.getMessage() for record in caplog.records] == (
        [] if whole else [True]
    )


@pytest.mark.parametrize("name", ["vqav2", "music-avqa", "sunrgbd-depth", "nsd"])
def test_media_are_those_of_the_question(name: str, benchmark_data: DataOf) -> None:
    data = benchmark_data(name)
    dataset, task = open_dataset(data / f"{name}-eval"), get_task(name)
    media = list_media(dataset, task, task.split, None)
    found = list(read_media(dataset, media, frozenset([media[0].key]), {}))
    assert [read.key for read in found] == [medium.key for medium in media]
    for read in found:
        assert {m: [tuple(v.shape) for v in rows] for m, rows in read.values.items()} == {
            m: [get_modality(m).value_shape] for m in task.modalities
        }
    assert len({read.content[task.modalities[0]] for read in found}) == len(found)
    assert found[0].picture and found[1].picture is None
    if name == "music-avqa":  # the sound comes out of the video
        assert media[0].questions[0].text == "Is the ukulele in the left?"
        assert float(found[0].values["audio"][0].std()) > 0.1


def test_a_depth_map_is_turned_back(benchmark_data: DataOf) -> None:
    import io

    import numpy as np
    from PIL import Image

    from onellm_dist.shards.format.parts import read_parts

    dataset = open_dataset(benchmark_data("nyuv2-depth") / "nyuv2-depth-eval")
    parts = read_parts(dataset, dataset.shards("test")[0], 0)
    depth = np.asarray(Image.open(io.BytesIO(parts["depth.png"].data)))
    assert depth[0, 0] == 1000 and depth[-1, 0] == 1000 + 47 * 40
    assert b'"depth_is_distance": true' in parts["json"].data


def list_samples(name: str, inputs: Path, split: str) -> list[RawSample]:
    """What the builder would store, without a build."""
    source = get_source(f"{name}-eval")
    assert source.plan is not None and source.raw_samples is not None
    options: dict[str, Any] = {"media": None, "splits": split, "any_count": True}
    (part,) = source.plan(inputs, seed=0, **options).input_splits
    return list(source.raw_samples(inputs, part.description, **options))


@pytest.mark.parametrize("inputs", ["in", "../in"])
def test_rooms_are_found_below_a_relative_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: str
) -> None:
    place = (tmp_path / "work" / inputs).resolve()
    write_benchmark(place, "nyuv2-depth")
    (tmp_path / "work").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "work")
    samples = list_samples("nyuv2-depth", Path(inputs), "test")
    assert [sample.problem for sample in samples] == [None] * 3
    for sample in samples:
        assert list(sample.parts) == ["jpg", "depth.png"]
        assert sample.parts["jpg"].read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templ_values": "['x']"}, "2 blanks and 1 values"),
        ({"type": "['Audio', "}, "cannot be read"),
    ],
)
def test_odd_rows_of_music_avqa_are_refused_in_words(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    row = {
        "type": '["Audio", "Counting"]',
        "question_content": "Is <A> left of <B>?",
        "templ_values": "['x', 'y']",
        "video_id": 1,
        "question_id": 1,
        "anser": "yes",
    }
    (tmp_path / "avqa-test.json").write_text(json.dumps([row | change]))
    with pytest.raises(OneLLMError, match=message):
        list_samples("music-avqa", tmp_path, "test")


def test_a_room_without_its_class_is_refused_in_words(tmp_path: Path) -> None:
    inputs = write_benchmark(tmp_path, "nyuv2-depth")
    (inputs / "SUNRGBD/kv1/NYUdata/NYU0002/scene.txt").unlink()
    with pytest.raises(OneLLMError, match=r"cannot be read: .*NYU0002/scene\.txt"):
        list_samples("nyuv2-depth", inputs, "test")


def test_a_whole_video_does_not_stand_for_two_of_its_clips(tmp_path: Path) -> None:
    rows = [
        {"videoID": f"{video}_00000{i}_000009", "enCap": ["a dog"]}
        for video, i in (("abcdefghijk", 1), ("abcdefghijk", 2), ("lmnopqrstuv", 3))
    ]
    (tmp_path / "vatex_public_test_english_v1.1.json").write_text(json.dumps(rows))
    for video in ("abcdefghijk", "lmnopqrstuv"):
        (tmp_path / f"{video}.mp4").write_bytes(b"film")
    problems = [sample.problem for sample in list_samples("vatex", tmp_path, "test")]
    assert problems[2] is None
    assert ["missing file" in str(problem) for problem in problems[:2]] == [True, True]


def test_another_number_of_questions_is_refused(tmp_path: Path) -> None:
    inputs = write_benchmark(tmp_path / "in", "gqa")
    with pytest.raises(UsageError, match=r"gqa testdev has 4 questions, officially 12,578"):
        build_dataset("gqa-eval", inputs, tmp_path / "out")


def change_rows(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def test_repeated_ids_missing_files_and_other_layouts_are_refused_by_name(tmp_path: Path) -> None:
    inputs = write_benchmark(tmp_path / "in", "textvqa")
    options = {"any_count": True}
    rows = inputs / "TextVQA_0.5.1_val.json"
    change_rows(rows, '"question_id": 3', '"question_id": 2')
    with pytest.raises(UsageError, match="textvqa val has the id 2 several times"):
        build_dataset("textvqa-eval", inputs, tmp_path / "out", options=options)
    change_rows(rows, '"question"', '"frage"')
    with pytest.raises(OneLLMError, match="textvqa val cannot be read: no 'question'"):
        build_dataset("textvqa-eval", inputs, tmp_path / "out", options=options)
    rows.unlink()
    with pytest.raises(UsageError, match=r"there is no TextVQA_0\.5\.1_val\.json"):
        build_dataset("textvqa-eval", inputs, tmp_path / "out", options=options)


def test_a_disk_that_fails_is_not_taken_for_another_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = write_benchmark(tmp_path / "in", "textvqa")
    options: dict[str, Any] = {"media": None, "splits": "val", "any_count": True}
    source = get_source("textvqa-eval")
    assert source.plan is not None
    plan = partial(source.plan, inputs, seed=0, **options)
    rows = inputs / "TextVQA_0.5.1_val.json"
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path != rows:
            return read(path)
        raise failure

    monkeypatch.setattr(Path, "read_bytes", fail)
    for failure in (PermissionError(13, "denied", str(rows)), OSError(5, "I/O error", str(rows))):
        with pytest.raises(OneLLMError) as error:
            plan()
        assert error.value.what == f"{rows}: {failure.strerror}"
        assert "permissions and the disk" in error.value.do
    failure = FileNotFoundError(2, "no such file", str(rows))  # as of a file beside the list
    with pytest.raises(OneLLMError, match="no such file") as error:
        plan()
    assert "differ from the official ones" in error.value.why


@pytest.mark.seconds
def test_media_that_cannot_be_read_make_a_dataset_incomplete(
    tmp_path: Path, toy_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = write_benchmark(tmp_path / "in", "vizwiz")
    (inputs / "val" / "VizWiz_val_1.jpg").unlink()
    (inputs / "val" / "VizWiz_val_2.jpg").write_bytes(b"no picture")
    report = build_dataset(
        "vizwiz-eval",
        inputs,
        tmp_path / "data" / "vizwiz-eval",
        options={"any_count": True, "max_failures": 0.9},
    )
    reasons = {q.file: q.reason for q in report.quarantined}
    assert "missing file: val/VizWiz_val_1.jpg" in reasons["val question VizWiz_val_1.jpg"]
    assert set(reasons) == {f"val question VizWiz_val_{i}.jpg" for i in (1, 2)}
    model, tokenizer = toy_model
    with pytest.raises(UsageError, match=r"vizwiz val has 2 of 4 questions"):
        evaluate_model(
            model,
            tokenizer,
            ["vizwiz"],
            tmp_path / "data",
            tmp_path / "out",
            EvaluationOptions(),
            identity="toy",
        )
    read, opened = benchmark_data._read_questions, []

    def read_and_note(*sample: Any) -> Any:
        opened.append(sample)
        return read(*sample)

    monkeypatch.setattr(benchmark_data, "_read_questions", read_and_note)
    unread = "media that could not be read"
    for limit, cut in (  # a limit may grow
        (1, f"3 not asked (--limit 1, or {unread})"),
        (3, f"2 not asked ({unread})"),
        (None, f"2 not asked ({unread})"),
    ):
        options, before = EvaluationOptions(limit=limit, any_count=True), len(opened)
        where = tmp_path / "data", tmp_path / "out"
        evaluate_model(model, tokenizer, ["vizwiz"], *where, options, identity="toy")
        assert len(opened) - before == min(limit or 2, 2), "what a limit cuts is not read"
        gaps = score_task(tmp_path / "out" / "vizwiz").describe_gaps()
        assert gaps == f"{cut}, 4,315 not asked (not in the dataset)"


def test_a_dataset_of_another_benchmark_is_refused(benchmark_data: DataOf) -> None:
    dataset = open_dataset(benchmark_data("okvqa") / "okvqa-eval")
    with pytest.raises(UsageError, match="not a dataset of the benchmark gqa"):
        list_media(dataset, get_task("gqa"), "val", None)


def test_a_sample_that_repeats_an_id_is_refused(benchmark_data: DataOf) -> None:
    dataset = open_dataset(benchmark_data("gqa") / "gqa-eval")
    shards = dataset._splits["testdev"]
    dataset._splits["testdev"] = (*shards, *shards)
    with pytest.raises(UsageError, match="the question q0 occurs twice"):
        list_media(dataset, get_task("gqa"), "testdev", None)


def test_files_that_change_during_a_build_are_found(tmp_path: Path) -> None:
    source = get_source("textvqa-eval")
    assert source.plan is not None and source.raw_samples is not None
    inputs = write_benchmark(tmp_path / "in", "textvqa")
    options: dict[str, Any] = {"media": None, "splits": "val", "any_count": True}
    (split,) = source.plan(inputs, seed=0, **options).input_splits
    assert len(list(source.raw_samples(inputs, split.description, **options))) == 2
    rows = inputs / "TextVQA_0.5.1_val.json"
    content = json.loads(rows.read_text())
    rows.unlink()  # the folder changes too
    rows.write_text(json.dumps({"data": content["data"][1:]}))
    with pytest.raises(OneLLMError, match="files changed while it was being built"):
        list(source.raw_samples(inputs, split.description, **options))


@pytest.mark.seconds
def test_a_medium_takes_the_spans_that_the_model_was_trained_with(
    benchmark_data: DataOf,
    toy_model: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A picture of 64 x 48 is no longer than a span, a wide one is cut into tiles."""
    inputs = write_benchmark(tmp_path / "in", "mmvet")
    (inputs / "images" / "v1_1.jpg").write_bytes(make_photo((900, 300), seed=1))
    data = tmp_path / "data"
    build_dataset("mmvet-eval", inputs, data / "mmvet-eval", options={"any_count": True})
    dataset, task = open_dataset(data / "mmvet-eval"), get_task("mmvet")
    media = list_media(dataset, task, task.split, None)
    found = list(read_media(dataset, media, frozenset(), {"image": 5}))
    counts = [len(read.values["image"]) for read in found]
    assert counts[0] == 1 and counts[1] > 1
    model, tokenizer = toy_model
    lengths: list[int] = []

    def spy(model: Any, prompts: Any, **options: Any) -> Any:
        lengths.extend(len(prompt.media) for prompt in prompts)
        for prompt in prompts:
            assert [medium.number for medium in prompt.media] == list(range(len(prompt.media)))
        return generate_batch(model, prompts, **options)

    monkeypatch.setattr(model.config, "spans", {"image": 5}, raising=False)
    asked = data, tmp_path / "out", EvaluationOptions(limit=2)
    evaluate_model(model, tokenizer, ["mmvet"], *asked, identity="toy", generate=spy)
    assert sorted(lengths) == sorted(counts[:2])
