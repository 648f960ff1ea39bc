"""GGUF files: every key that changes numbers is read, or the file is refused by that key's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama
from gguf_files import tensors_of, write
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.conversion import convert
from onellm_dist.convert.gguf_config import find_llama3_scaling
from onellm_dist.convert.opening import open_checkpoint

gguf = pytest.importorskip("gguf")


def scaled_llama() -> tuple[Any, torch.Tensor]:
    """A llama with LLaMA 3.1's positions, and llama.cpp's factors of its frequencies."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(**{**llama().config.to_dict(), "rope_parameters": rope})
    model = AutoModelForCausalLM.from_config(config).eval()
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 16, 2) / 16)
    return model, plain / scaled


def test_llama3_scaling_is_read_from_the_factors(tmp_path: Path) -> None:
    model, factors = scaled_llama()
    tensors = {**tensors_of(model), "rope_freqs.weight": factors}
    path = write(tmp_path / "m.gguf", tensors, theta=500000.0)
    convert("gguf", path, tmp_path / "hf", quiet=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    ids = torch.randint(3, 96, (1, 1500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)
    assert loaded.config.rope_parameters["factor"] == 8.0


def test_other_factors_are_refused(tmp_path: Path) -> None:
    model, factors = scaled_llama()
    tensors = {**tensors_of(model), "rope_freqs.weight": factors * 1.01}
    path = write(tmp_path / "m.gguf", tensors, theta=500000.0)
    with pytest.raises(UsageError, match=r"rotary frequencies .* scaled in a way"):
        convert("gguf", path, tmp_path / "hf", quiet=True)
    assert find_llama3_scaling(torch.ones(8), 1e4) == {}
    assert not (tmp_path / "hf").exists()


REFUSED: dict[str, tuple[Callable[[Any], object], str]] = {
    "yarn": (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "scaled by yarn"),
    "a part of each head": (lambda w: w.add_rope_dimension_count(8), "8 of 16 channels"),
    "an unknown key": (lambda w: w.add_logit_scale(0.5), "logit_scale=0.5"),
    "capped logits": (lambda w: w.add_final_logit_softcapping(30.0), "softcapping=30"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_lost_is_refused_by_name(what: str, tmp_path: Path) -> None:
    change, words = REFUSED[what]
    path = write(tmp_path / "m.gguf", tensors_of(llama()), change)
    with pytest.raises(UsageError, match=words):
        convert("gguf", path, tmp_path / "hf", quiet=True)


def test_linear_scaling_and_all_end_tokens_are_kept(tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(7)

    opened = open_checkpoint(write(tmp_path / "m.gguf", tensors_of(llama()), change))
    rope = opened.config.rope_parameters
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)
    assert opened.generation is not None
    assert opened.generation["eos_token_id"] == [2, 7]


def test_all_parts_of_a_split_file_are_read(tmp_path: Path) -> None:
    model = llama()
    tensors = list(tensors_of(model).items())
    for number, part in enumerate((tensors[:2], tensors[2:]), 1):

        def change(writer: Any, number: int = number) -> None:
            writer.add_uint16("split.no", number - 1)
            writer.add_uint16("split.count", 2)

        write(tmp_path / f"m-0000{number}-of-00002.gguf", dict(part), change)
    convert("gguf", tmp_path / "m-00002-of-00002.gguf", tmp_path / "hf", quiet=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in loaded.state_dict().items())
    assert not loaded.config.tie_word_embeddings
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(UsageError, match=r"parts; missing: m-00002-of-00002\.gguf"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize("blocks", [1, 3, 1026])
def test_blocks_without_tensors_are_refused_before_a_model_of_so_many_is_built(
    blocks: int, tmp_path: Path
) -> None:
    def state(writer: Any) -> None:
        (values,) = writer.kv_data
        values["llama.block_count"].value = blocks

    path = write(tmp_path / "m.gguf", tensors_of(llama()), state)
    with pytest.raises(UsageError, match=f"block_count is {blocks}, 2 have tensors"):
        convert("gguf", path, tmp_path / "hf", quiet=True)
    assert not (tmp_path / "hf").exists()
