"""A checkpoint is resumed by the model it was made with, and by no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_folders import checkpoint, config
from one_rank import ONE_RANK

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import ModelSection, RunConfig
from onellm_dist.config.train_sections import DpoSection
from onellm_dist.train.checkpoint.reference import describe_reference
from onellm_dist.train.checkpoint.resume import find_checkpoint
from onellm_dist.train.checkpoint.source import check_source, describe_source


def test_frozen_weights_must_be_those_of_the_checkpoint(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "config.json").write_text("{}")
    own = config(tmp_path, model={"path": str(model)})
    manifest = {"frozen": json.loads(json.dumps(describe_source(own)))}
    check_source(tmp_path, manifest, own, ONE_RANK)
    check_source(tmp_path, {}, own, ONE_RANK)  # version 1
    (model / "model.safetensors").write_bytes(b"weights")  # another time, the same bytes
    check_source(tmp_path, manifest, own, ONE_RANK)
    (model / "model.safetensors").write_bytes(b"weighed")
    with pytest.raises(UsageError, match=r"other frozen weights.*model.safetensors has sha256"):
        check_source(tmp_path, manifest, own, ONE_RANK)
    (model / "more.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"other files: more.safetensors"):
        check_source(tmp_path, manifest, own, ONE_RANK)
    with pytest.raises(UsageError, match=r"now model\.preset=toy"):
        check_source(tmp_path, manifest, config(tmp_path), ONE_RANK)


def test_span_positions_must_be_those_of_the_checkpoint(tmp_path: Path) -> None:
    plain, fixed = (
        config(tmp_path, model={"preset": "toy", "span_positions": kind})
        for kind in (None, "fixed")
    )
    none = config(tmp_path, model={"preset": "toy", "span_positions": "none"})
    manifest = {"frozen": json.loads(json.dumps(describe_source(fixed)))}
    check_source(tmp_path, manifest, fixed, ONE_RANK)
    with pytest.raises(UsageError, match=r"span_positions=fixed, now it is unset"):
        check_source(tmp_path, manifest, plain, ONE_RANK)
    before = {"frozen": describe_source(plain)}
    assert "span_positions" not in before["frozen"]
    check_source(tmp_path, before, none, ONE_RANK)
    with pytest.raises(UsageError, match=r"span_positions=unset, now it is fixed"):
        check_source(tmp_path, before, fixed, ONE_RANK)


@pytest.mark.parametrize("own", ["none", "fixed", "learned"])
def test_span_positions_of_a_model_may_be_stated_or_not(own: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text(json.dumps({"span_positions": own}))
    model = {"path": str(tmp_path)}
    unset, stated = (
        config(tmp_path, model=model),
        config(tmp_path, model={**model, "span_positions": own}),
    )
    other = config(
        tmp_path, model={**model, "span_positions": "fixed" if own != "fixed" else "learned"}
    )
    for before, now in ((unset, stated), (stated, unset), (stated, stated)):
        check_source(tmp_path, {"frozen": describe_source(before)}, now, ONE_RANK)
    for before, now in ((unset, other), (other, unset), (stated, other), (other, stated)):
        with pytest.raises(UsageError, match=r"was trained with model\.span_positions="):
            check_source(tmp_path, {"frozen": describe_source(before)}, now, ONE_RANK)
    (tmp_path / "config.json").write_text("{}")  # saved before there were any
    frozen = {"frozen": describe_source(unset)}
    none = config(tmp_path, model={**model, "span_positions": "none"})
    check_source(tmp_path, frozen, none, ONE_RANK)


def test_a_preset_and_its_seed_must_be_those_of_the_checkpoint(tmp_path: Path) -> None:
    manifest = {"frozen": describe_source(config(tmp_path, seed=3))}
    check_source(tmp_path, manifest, config(tmp_path, seed=3), ONE_RANK)
    with pytest.raises(UsageError, match=r"run\.seed was 3, now 4"):
        check_source(tmp_path, manifest, config(tmp_path, seed=4), ONE_RANK)
    with pytest.raises(UsageError, match=r"model\.preset was toy"):
        check_source(
            tmp_path, manifest, config(tmp_path, seed=3, model={"preset": "smollm2-135m"}), ONE_RANK
        )


def test_known_files_are_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    own = config(tmp_path, model={"path": str(tmp_path)})
    known = describe_source(own)
    monkeypatch.setattr(
        "onellm_dist.train.checkpoint.source.hash_once", lambda path: pytest.fail("hashed")
    )
    assert describe_source(own, known) == known


def make_dpo(run_dir: Path, reference: Any, copied: tuple[str, ...] = ()) -> RunConfig:
    """A recipe of DPO; of ordinary training without a reference."""
    own = config(run_dir)
    keys = {} if reference is None else {"loss": "dpo", "dpo": DpoSection(reference=reference)}
    model = ModelSection(preset="toy", init_from_image=copied)
    return own.model_copy(update={"train": own.train.model_copy(update=keys), "model": model})


@pytest.mark.parametrize("named", [False, True], ids=["latest", "named"])
def test_a_reference_must_be_that_of_the_checkpoint(tmp_path: Path, named: bool) -> None:
    """Whether a start finds the checkpoint, or the recipe names it."""

    def resume(before: RunConfig, now: RunConfig, name: str) -> Path | None:
        root = tmp_path / name / "checkpoints"
        said: dict[str, Any] = {"model": before.model.model_dump(mode="json")}
        folder = checkpoint(root / "step-00000001", **said | describe_reference(before))
        if named:
            section = now.checkpoint.model_copy(update={"resume": folder})
            now = now.model_copy(update={"checkpoint": section})
        return find_checkpoint(now, root, ONE_RANK).folder

    plain, adapter, copied = (make_dpo(tmp_path, kind) for kind in (None, "adapter", "copy"))
    audio = make_dpo(tmp_path, "copy", ("audio",))
    for number, own in enumerate((plain, adapter, copied, audio)):
        assert resume(own, own, f"same-{number}")
    assert resume(adapter, plain, "tuned further")
    for number, now in enumerate((adapter, copied)):
        with pytest.raises(UsageError, match=r"was not trained with train\.loss=dpo"):
            resume(plain, now, f"none-{number}")
    with pytest.raises(UsageError, match=r"reference=adapter, now it is copy"):
        resume(adapter, copied, "kind")
    for number, (before, now) in enumerate(((audio, copied), (copied, audio))):
        with pytest.raises(UsageError, match=r"trained with model\.init_from_image="):
            resume(before, now, f"start-{number}")
