"""Captioning of a dataset: the right prompt, every sample once, answers cut at the stop string."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_captions import parse_caption

from onellm_dist.common.errors import SampleError, UsageError
from onellm_dist.evaluation.captioning import (
    caption_datasets,
    caption_split,
    generate_answers,
    read_captions,
    read_questions,
)
from onellm_dist.modalities import get_modality
from onellm_dist.model.presets import load_model
from onellm_dist.shards import open_dataset
from onellm_dist.shards.sources.toyworld import world
from onellm_dist.shards.sources.toyworld.build import build_toyworld
from onellm_dist.testing.demo.report_data import (
    compute_router_weights,
    draw_samples,
    list_resumes,
    make_curve,
)
from onellm_dist.testing.demo.toy_llm import LLMPretraining, pretrain_llm, score_composition


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy")
    build_toyworld(
        out, seed=3, train_per_modality=2, test_per_modality=3, modalities=("image", "imu")
    )
    return out


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = load_model(path=None, preset="toy", seed=0)
    out = tmp_path_factory.mktemp("model")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return out


def test_questions_are_laid_out_as_training_does(toy: Path) -> None:
    dataset = open_dataset(toy / "imu")
    asked = list(read_questions(dataset, "test_held_out"))
    assert len(asked) == 3
    first = asked[0]
    assert first.prompt.endswith("### Human: Describe the motion.\n### Assistant:")
    assert first.prompt.startswith("A chat between")
    said = parse_caption("imu", first.reference)
    assert tuple(said.values()) in world.get_held_out("imu")
    assert first.values["imu"].shape == (6, 400)
    assert [q.prompt for q in read_questions(dataset, "test_seen", limit=2, ask=False)] == ["", ""]


@pytest.mark.seconds
def test_every_sample_is_captioned_once(toy: Path, model_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    caption_datasets(
        model_path, [toy / "image", toy / "imu"], out, splits=["test_seen", "test_held_out"]
    )
    captions = read_captions(out)
    assert len({(c.modality, c.split, c.key) for c in captions}) == len(captions) == 2 * 2 * 3
    assert {c.modality for c in captions} == {"image", "imu"}
    shown = draw_samples(toy, captions, count=2)
    assert [s.modality for s in shown] == ["image", "image", "imu", "imu"]
    assert all(s.split == "test_held_out" and min(s.picture.size) > 50 for s in shown)
    with pytest.raises(UsageError, match="no split 'nonsense'"):
        caption_datasets(model_path, [toy / "image"], out, splits=["nonsense"])


def test_a_linked_dataset_is_captioned_on_request(toy: Path, tmp_path: Path) -> None:
    shutil.copytree(toy / "imu", tmp_path / "imu")
    (tar, *_) = (tmp_path / "imu").rglob("*.tar")
    tar.unlink()
    tar.symlink_to(toy / tar.relative_to(tmp_path))
    call = partial(
        caption_datasets,
        tmp_path / "no model",
        [tmp_path / "imu"],
        tmp_path / "out",
        splits=["test_seen"],
    )
    with pytest.raises(UsageError, match="leads out of the folder"):
        call()
    with pytest.raises(UsageError, match="no model"):
        call(follow_links=True)


@pytest.mark.seconds
def test_answers_do_not_depend_on_the_batch(toy: Path, model_path: Path) -> None:
    loaded, processor = load_model(path=model_path, preset=None, seed=0)
    model: Any = loaded
    model.eval()
    dataset = open_dataset(toy / "image")
    asked = list(read_questions(dataset, "test_seen"))
    together = generate_answers(model, processor.tokenizer, asked)
    assert together == [generate_answers(model, processor.tokenizer, [q])[0] for q in asked]
    assert [
        c.prediction
        for c in caption_split(model, processor.tokenizer, dataset, "test_seen", batch=2)
    ] == together


def test_an_answer_ends_at_the_stop_string(toy: Path, model_path: Path) -> None:
    """The model generates ' red', a line break and '###', and would continue."""
    _, processor = load_model(path=model_path, preset=None, seed=0)
    tokenizer = processor.tokenizer
    script = tokenizer(" red\n### Human", add_special_tokens=False).input_ids

    class Scripted:
        device = torch.device("cpu")

        def generate(
            self,
            ids: torch.Tensor,
            mask: torch.Tensor,
            *,
            max_new_tokens: int,
            eos_token_id: list[int],
            **_: object,
        ) -> torch.Tensor:
            stop = next(i for i, token in enumerate(script) if token in eos_token_id) + 1
            assert tokenizer.decode(script[:stop]) == " red\n###" and max_new_tokens >= len(script)
            return torch.cat([ids, torch.tensor([script[:stop]] * len(ids))], dim=1)

    asked = list(read_questions(open_dataset(toy / "image"), "test_seen"))
    assert generate_answers(Scripted(), tokenizer, asked) == ["red"] * 3


def test_router_weights_sum_to_one(model_path: Path) -> None:
    weights = compute_router_weights(model_path)
    assert list(weights) == list(world.MODALITIES)
    assert all(abs(sum(row) - 1) < 1e-5 for rows in weights.values() for row in rows)
    assert {(len(rows), len(rows[0])) for rows in weights.values()} == {(30, 3)}


def test_a_curve_marks_the_resume() -> None:
    metrics = [
        {"step": i, "loss": 2.0 - i, "loss_by_modality": {"a": 1.0} if i else {"a": 1.0, "b": 3.0}}
        for i in range(2)
    ]
    events = [{"event": "start", "first_step": 0}, {"event": "start", "first_step": 1}]
    curve = make_curve("x", metrics, events)
    assert curve.loss == [(0.0, 2.0), (1.0, 1.0)] and curve.marks == {1.0: "killed, resumed"}
    assert curve.by_modality["b"] == [(0.0, 3.0)]


@pytest.mark.slow
def test_a_short_pretraining_teaches_the_llm_to_write_what_it_is_asked_for() -> None:
    model, processor = load_model(path=None, preset="toy", seed=0)
    before = score_composition(model.llm, processor.tokenizer, samples=40)
    losses = pretrain_llm(
        model.llm, processor.tokenizer, LLMPretraining(steps=60, batch=32, conversations=0.0)
    )
    assert losses[-1] < 0.3 * losses[0]
    assert before < 0.05 and score_composition(model.llm, processor.tokenizer, samples=40) > 0.3


def test_corpus_documents_hold_no_held_out_combination() -> None:
    from onellm_dist.testing.demo.toy_llm import ToyDocuments

    _, processor = load_model(path=None, preset="toy", seed=0)
    ids, labels = next(
        iter(
            ToyDocuments(
                processor.tokenizer, LLMPretraining(batch=200, conversations=0.0, words_first=1.0)
            )
        )
    )
    held = {
        world.make_caption(m, world.to_attributes(m, c))
        for m in world.MODALITIES
        for c in world.get_held_out(m)
    }
    texts = [
        processor.tokenizer.decode([t for t in row if t > 2]).strip() for row in labels.tolist()
    ]
    assert len(set(texts)) > 50 and not held & set(texts)
    assert ids[:, 0].tolist() == [1] * 200


def test_a_resume_is_read_from_the_events(tmp_path: Path) -> None:
    lines = [
        '{"event": "start", "first_step": 0}',
        '{"event": "checkpoint", "step": 8}',
        '{"event": "start", "first_step": 8}',
    ]
    events = tmp_path / "events.jsonl"
    events.write_text("\n".join(lines[:2]) + "\n")
    assert list_resumes(tmp_path) == []
    events.write_text("\n".join(lines) + "\n")
    assert list_resumes(tmp_path) == [8]


def test_a_sample_that_crashes_its_decoder_is_named(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = open_dataset(toy / "image")
    [first, second, _] = read_questions(dataset, "test_seen")
    modality = type(get_modality("image"))
    read_value = modality.read_value

    def planted(self: Any, *args: Any, **options: Any) -> torch.Tensor:
        value = read_value(self, *args, **options)
        if torch.equal(value, second.values["image"]):
            faulthandler.disable()  # pytest's; the crash is meant
            os.kill(os.getpid(), signal.SIGSEGV)
        return value

    monkeypatch.setattr(modality, "read_value", planted)
    asked = read_questions(dataset, "test_seen")
    assert torch.equal(next(asked).values["image"], first.values["image"])
    with pytest.raises(SampleError, match=rf"{second.key}: its decoder failed: .*SIGSEGV"):
        list(asked)
