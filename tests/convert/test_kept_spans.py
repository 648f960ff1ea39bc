"""`data.spans` and rows of span positions through conversion and extension, as a run has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import onellm, save_run
from one_rank import ONE_RANK, OneRankEngine

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import ConversionOptions
from onellm_dist.convert.conversion import convert
from onellm_dist.convert.extend import Additions, extend_model
from onellm_dist.convert.new_parameters import copy_projector
from onellm_dist.convert.opening import open_checkpoint
from onellm_dist.model import OneLLMConfig, OneLLMProcessor
from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.model.spans.trained import get_spans, set_spans
from onellm_dist.model.weights.lazy import open_model
from onellm_dist.train.export.model import export_model
from onellm_dist.train.optim.parts import find_copies


def save(folder: Path, spans: dict[str, int], **arguments: Any) -> Path:
    model = onellm(**arguments)
    for name, parameter in model.named_parameters():
        if "span_positions" in name:
            torch.nn.init.normal_(parameter)
    set_spans(model.config, spans)
    model.save_pretrained(folder)
    OneLLMProcessor(load_toy_tokenizer(), spans=spans).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, {"image": 5}), ({"image": 3}, {}), ({"image": 3}, {"image": 5, "imu": 2}), ({}, {})],
)
@pytest.mark.seconds
def test_a_run_converts_to_the_spans_that_it_exports(
    before: dict[str, int], after: dict[str, int], tmp_path: Path
) -> None:
    """Config and processor are those of `RUN/model`, whatever the spans of the base."""
    base = save(tmp_path / "base", before)
    save_run(tmp_path / "run", base, 1, precision="fp32", spans=after)
    convert("run", tmp_path / "run", tmp_path / "out", quiet=True)
    model, processor, _ = open_model(path=base, preset=None, seed=0)
    set_spans(model.config, after)  # as `open_plans` of a run does
    engine: Any = OneRankEngine(onellm())
    export_model(tmp_path / "model", engine, model, processor, ONE_RANK)
    for name in ("config.json", "processor_config.json"):
        exported, found = (json.loads((tmp_path / f / name).read_text()) for f in ("model", "out"))
        assert found == exported, name
        assert (found.get("spans") or {}) == after, name


def test_a_run_whose_spans_cannot_be_read_is_refused(tmp_path: Path) -> None:
    base = save(tmp_path / "base", {})
    save_run(tmp_path / "run", base, 1)
    for wrong in ("[1]", "{image: 0}", "{image: many}", "{image: 129}"):
        (tmp_path / "run" / "config.yaml").write_text(
            f"train: {{precision: bf16}}\ndata: {{spans: {wrong}}}"
        )
        with pytest.raises(UsageError, match=r"config\.yaml: data\.spans"):
            convert("run", tmp_path / "run", tmp_path / "out", quiet=True)
    for damaged, word in (
        ("", "cannot be read"),
        ("[", "cannot be read"),
        ("bf16", "cannot be read"),
        ("train: bf17", "train.precision is bf17"),
        ("train: {precision: [1]}", "train.precision is"),
    ):
        (tmp_path / "run" / "config.yaml").write_text(damaged)
        with pytest.raises(UsageError, match=word):
            convert("run", tmp_path / "run", tmp_path / "out", quiet=True)


@pytest.mark.parametrize("spans", [{}, {"image": 5}])
def test_a_checkpoint_has_its_own_spans(
    spans: dict[str, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also away from its run, and where a later start of the run had others."""
    base = save(tmp_path / "base", {"image": 3})
    folder = save_run(tmp_path / "run", base, 1, spans={"image": 2}, recorded_spans=spans)
    convert("run", folder, tmp_path / "here", quiet=True)
    folder.rename(tmp_path / folder.name)
    convert("run", tmp_path / folder.name, tmp_path / "there", quiet=True)
    for name in ("here", "there"):
        assert get_spans(OneLLMConfig.from_pretrained(tmp_path / name)) == spans
    assert not caplog.records


def test_a_checkpoint_that_does_not_say_its_spans_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of 0.2.0, without the recipe beside them."""
    save_run(tmp_path / "run", save(tmp_path / "base", {"image": 3}), 1, spans={"image": 5})
    (tmp_path / "run" / "config.yaml").unlink()
    convert("run", tmp_path / "run", tmp_path / "out", quiet=True)
    assert get_spans(OneLLMConfig.from_pretrained(tmp_path / "out")) == {"image": 3}
    assert "does not say what data.spans was" in caplog.text


def test_spans_go_there_and_back(tmp_path: Path) -> None:
    spans = {"image": 5, "imu": 2}
    convert("onellm", save(tmp_path / "one", spans), tmp_path / "two", to="onellm", quiet=True)
    convert("onellm", tmp_path / "two", tmp_path / "there", to="reference", quiet=True)
    options = ConversionOptions(tokenizer=tmp_path / "one")
    convert("reference", tmp_path / "there", tmp_path / "back", options=options, quiet=True)
    for name in ("two", "back"):
        assert get_spans(OneLLMConfig.from_pretrained(tmp_path / name)) == spans
        assert OneLLMProcessor.from_pretrained(tmp_path / name).spans == spans
    config = json.loads((tmp_path / "one" / "config.json").read_text())
    (tmp_path / "one" / "config.json").write_text(json.dumps({**config, "spans": {"image": "a"}}))
    with pytest.raises(UsageError, match=r"config\.json: spans: \{'image': 'a'\}"):
        convert("onellm", tmp_path / "one", tmp_path / "three", to="onellm", quiet=True)


def test_a_new_modality_changes_no_spans_and_takes_no_rows(tmp_path: Path) -> None:
    """Its span positions start at zero; image's were trained for tiles."""
    folder = save(tmp_path / "one", {"image": 5}, span_positions="learned")
    opened = open_checkpoint(folder, ConversionOptions())
    extended = extend_model(opened, Additions(experts=1, modalities=["audio"]), 0)
    assert get_spans(extended.config) == {"image": 5}
    assert extended.config.modalities == ["image", "audio", "imu"]
    assert opened.config.modalities == ["image", "imu"]
    ours, theirs = (
        extended.tensors[f"projectors.{name}.span_positions.weight"].load()
        for name in ("audio", "image")
    )
    assert theirs.any() and ours.shape == theirs.shape and not ours.any()
    tags = (extended.tensors[f"projectors.{n}.queries.weight"].load() for n in ("audio", "image"))
    assert torch.equal(*tags)


def test_init_from_image_copies_alike_in_a_run_and_in_its_conversion(tmp_path: Path) -> None:
    """Neither copies rows of span positions."""
    folder = save(tmp_path / "one", {}, span_positions="learned")
    model, _, weights = open_model(path=folder, preset=None, seed=0)
    opened = open_checkpoint(folder, ConversionOptions())
    copies = find_copies(model, "image", ["imu"])
    converted = copy_projector(opened.tensors, "image", "imu")
    assert copies.keys() == converted.keys()
    weights.copy(copies)
    for name, tensor in {**opened.tensors, **converted}.items():
        assert torch.equal(weights.rows(name, 0, tensor.shape[0]), tensor.load()), name
    name = "projectors.{}.span_positions.weight"
    rows = [weights.rows(name.format(n), 0, 127) for n in ("image", "imu")]
    assert not torch.equal(*rows)
