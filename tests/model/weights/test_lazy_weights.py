"""A model opened without its weights is what `load_model` loads, row by row."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packs import small_model
from safetensors.torch import load_file, save_file

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.model import (
    OneLLMForConditionalGeneration,
    OneLLMProcessor,
    build_config,
    load_model,
)
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.model.weights.lazy import (
    InitialWeights,
    RandomWeights,
    build_empty_model,
    open_model,
)


def same(model: torch.nn.Module, opened: tuple[torch.nn.Module, object, InitialWeights]) -> bool:
    """Whether a model's parameters are those of opened weights, complete and in part."""
    empty, _, weights = opened
    assert all(p.is_meta for p in empty.parameters())
    wanted = dict(model.named_parameters())
    assert wanted.keys() == dict(empty.named_parameters()).keys()
    complete = all(torch.equal(weights.rows(n, 0, len(p)), p) for n, p in wanted.items())
    return complete and all(
        torch.equal(weights.rows(n, len(p) // 3, len(p) // 2), p[len(p) // 3 : len(p) // 2])
        for n, p in wanted.items()
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    small_model(words=512).save_pretrained(tmp_path / "model")
    OneLLMProcessor(load_toy_tokenizer()).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.seconds
def test_a_preset_draws_what_load_model_draws() -> None:
    for seed in (0, 3):
        model, _ = load_model(path=None, preset="toy", seed=seed)
        assert same(model, open_model(path=None, preset="toy", seed=seed))


def test_copied_experts_are_drawn_as_the_first() -> None:
    config = build_config("toy")
    config.upm.init = "copied"
    model = OneLLMForConditionalGeneration(config)
    initialise(model, 4)
    empty = build_empty_model(config)
    assert same(model, (empty, None, InitialWeights(RandomWeights(empty, 4))))


def test_a_directory_of_one_or_several_files(saved: Path) -> None:
    model, _ = load_model(path=saved, preset=None, seed=0)
    assert same(model, open_model(path=saved, preset=None, seed=0))
    model.save_pretrained(saved, max_shard_size="200KB")
    (saved / "model.safetensors").unlink(missing_ok=True)
    assert (saved / "model.safetensors.index.json").is_file()
    assert same(model, open_model(path=saved, preset=None, seed=0))


def test_buffers_are_real_and_tied_weights_are_one() -> None:
    config = build_config("toy")
    config.text_config.tie_word_embeddings = True
    empty = build_empty_model(config)
    assert not any(b.is_meta for b in empty.buffers()) and list(empty.buffers())
    assert empty.get_input_embeddings().weight is empty.get_output_embeddings().weight


def test_seven_billion_weights_take_no_memory() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build_empty_model(build_config("onellm-7b"))
    assert sum(p.numel() for p in model.parameters()) > 7e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def without_a_key(state: dict[str, torch.Tensor]) -> None:
    del state["encoder.positions.weight"]


def with_another(state: dict[str, torch.Tensor]) -> None:
    state["encoder.extra.weight"] = torch.zeros(2)


def with_another_shape(state: dict[str, torch.Tensor]) -> None:
    state["encoder.positions.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_key, "missing_keys: encoder.positions.weight"),
        (with_another, "unexpected_keys: encoder.extra.weight"),
        (with_another_shape, "mismatched_keys: encoder.positions.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    saved: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    state = load_file(saved / "model.safetensors")
    change(state)
    save_file(state, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(OneLLMError, match=message):
        open_model(path=saved, preset=None, seed=0)


def test_files_that_are_not_there_or_cut_short_are_refused(saved: Path, tmp_path: Path) -> None:
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OneLLMError, match="cannot be read"):
        open_model(path=saved, preset=None, seed=0)
    (saved / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "gone.safetensors"}})
    )
    with pytest.raises(OneLLMError, match=r"gone\.safetensors"):
        open_model(path=saved, preset=None, seed=0)
    with pytest.raises(UsageError, match="no model in"):
        open_model(path=tmp_path, preset=None, seed=0)
