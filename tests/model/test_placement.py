"""Models that `device_map` spreads over memory and disk: the same numbers, and whole layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from llm_families import FAMILIES, tiny_config
from packs import small_model
from transformers import AutoModelForCausalLM

from onellm_dist.model import OneLLMConfig, OneLLMForConditionalGeneration
from onellm_dist.model.batched_generation import Medium, Prompt, generate_batch
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.placement import get_device, list_layer_classes

MODALITIES = ["image", "imu"]


def make_model(family: str) -> Any:
    small = small_model().config
    config = OneLLMConfig(
        vision=small.vision,
        upm=small.upm,
        text_config=tiny_config(family),
        modalities=MODALITIES,
    )
    model = OneLLMForConditionalGeneration(config)
    initialise(model, 0)
    return model.eval()


def make_inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.tensor([[1, 5, 9, 7], [1, 8, 4, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "image_values": torch.randn(2, 3, 224, 224, generator=generator),
    }


def compute(model: Any) -> dict[str, Any]:
    """What a model gives by all ways in which it is used."""
    inputs = make_inputs()
    found: dict[str, Any] = {}
    with torch.no_grad():
        logits = model(**inputs).logits
        mask = model.build_inputs(
            inputs["input_ids"], inputs["attention_mask"], {"image_values": inputs["image_values"]}
        ).mask
        found["logits"] = logits[mask.bool()]
    one = {name: value[:1] for name, value in inputs.items()}
    found["generated"] = model.generate(**one, max_new_tokens=4, do_sample=False)
    imu = Medium("imu", torch.randn(6, 400, generator=torch.Generator().manual_seed(1)))
    prompts = [Prompt([1, 5, 9], [imu], max_new_tokens=3), Prompt([1, 7], max_new_tokens=4)]
    found["batch"] = [answer.tokens for answer in generate_batch(model, prompts, end_ids=[2])]
    return found


def check_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    torch.testing.assert_close(found["logits"], wanted["logits"], atol=1e-6, rtol=1e-5)
    assert torch.equal(found["generated"], wanted["generated"])
    assert found["batch"] == wanted["batch"]


@pytest.mark.parametrize("places", ["parts", "layers", "all"])
def test_weights_on_a_disk_are_fetched_when_they_are_needed(places: str, tmp_path: Path) -> None:
    model = make_model("llama")
    wanted = compute(model)
    model.save_pretrained(tmp_path / "model")
    maps: dict[str, Any] = {
        "parts": {"": "cpu", "encoder": "disk", "upm": "disk", "projectors": "disk"},
        "layers": {"": "cpu", "llm.model.embed_tokens": "disk", "llm.model.layers.1": "disk"},
        "all": {"": "disk"},
    }
    placed: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=maps[places], offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in placed.parameters())
    assert placed.device == get_device(placed.llm) == torch.device("cpu")
    check_same(compute(placed), wanted)
    assert any(parameter.is_meta for parameter in placed.parameters())  # fetched, and given back


def test_the_map_that_memory_allows_gives_the_same_numbers(tmp_path: Path) -> None:
    model = make_model("qwen2")
    wanted = compute(model)
    model.save_pretrained(tmp_path / "model")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    placed: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map="auto",
        max_memory={"cpu": size // 2},
        offload_folder=tmp_path / "offload",
    )
    assert {"cpu", "disk"} <= set(placed.hf_device_map.values())
    check_same(compute(placed), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_of_any_llm_is_split(family: str) -> None:
    model = make_model(family)
    classes = list_layer_classes(model.llm)
    assert classes and classes <= model._no_split_modules
    assert {"EncoderBlock", "UPMBlock"} <= model._no_split_modules
    whole = [name for name, part in model.named_modules() if type(part).__name__ in classes]
    assert len(whole) == 2
    largest = max(
        sum(p.numel() * p.element_size() for p in part.parameters())
        for part in model.modules()
        if type(part).__name__ in model._no_split_modules or not any(part.children())
    )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for share in (3, 5, 7):
        room = max(largest + 1, size * share // 8)
        places = infer_auto_device_map(
            model, {"cpu": room}, no_split_module_classes=model._no_split_modules
        )
        for name in whole:
            inside = [place for place in places if place.startswith(f"{name}.")]
            assert not inside, inside


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2", "mixtral", "falcon"])
def test_llms_of_other_families_run_from_a_disk(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    wanted = compute(model)
    places = infer_auto_device_map(
        model, {"cpu": 1}, no_split_module_classes=model._no_split_modules
    )
    assert "disk" in places.values()
    placed = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    check_same(compute(placed), wanted)
