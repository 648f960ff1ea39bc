"""Models that `device_map` spreads over memory and disk: the same numbers, and whole layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map
from llm_families import FAMILIES, tiny_config
from packs import small_model
from transformers import AutoModelForCausalLM

from onellm_dist.common.errors import UsageError
from onellm_dist.model import OneLLMConfig, OneLLMForConditionalGeneration
from onellm_dist.model.generation.batched import Medium, Prompt, generate_batch
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.placement import get_device, list_layer_classes

MODALITIES = ["image", "imu"]


def make_model(family: str) -> Any:
    small = small_model().config
    torch.manual_seed(0)
    config = OneLLMConfig(
        vision=small.vision,
        upm=small.upm,
        text_config=tiny_config(family),
        modalities=MODALITIES,
    )
    model: Any = OneLLMForConditionalGeneration(config)
    initialise(model, 0, skip=("llm.",))
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


OWN = ("encoder", "tokenizers", "projectors", "upm")
MAPS: dict[str, dict[str, str]] = {
    "parts": {"encoder": "disk", "tokenizers": "cpu", "projectors": "disk", "upm": "disk"}
    | {"llm": "cpu"},
    "layers": dict.fromkeys(OWN, "cpu")
    | {"llm.model.embed_tokens": "disk", "llm.model.layers.0": "cpu"}
    | {"llm.model.layers.1": "disk", "llm.model.norm": "disk"}
    | {"llm.model.rotary_emb": "cpu", "llm.lm_head": "cpu"},
    "all": {"": "disk"},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A model's folder, and what the model gives."""
    folder = tmp_path_factory.mktemp("saved")
    model = make_model("llama")
    model.save_pretrained(folder)
    return folder, compute(model)


@pytest.mark.slow
@pytest.mark.parametrize("places", MAPS)
def test_weights_on_a_disk_are_fetched_when_they_are_needed(
    places: str, saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, wanted = saved
    placed: Any = AutoModelForCausalLM.from_pretrained(
        folder, device_map=MAPS[places], offload_folder=tmp_path
    )
    assert any(parameter.is_meta for parameter in placed.parameters())
    assert placed.device == get_device(placed.llm) == torch.device("cpu")
    check_same(compute(placed), wanted)
    assert any(parameter.is_meta for parameter in placed.parameters())  # fetched, and given back


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_map_that_memory_allows_gives_the_same_numbers_and_cuts_no_layer(
    family: str, saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, wanted = saved
    if family != "llama":
        folder, model = tmp_path / "model", make_model(family)
        wanted = compute(model)
        model.save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    placed: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map="auto",
        max_memory={"cpu": size // 2},
        offload_folder=tmp_path / "offload",
    )
    places = placed.hf_device_map
    assert {"cpu", "disk"} <= set(places.values())
    classes = set(placed._no_split_modules)
    layers = [name for name, part in placed.named_modules() if type(part).__name__ in classes]
    assert len(layers) >= 4 and any("." in place for place in places)
    assert not [place for place in places if place.startswith(tuple(f"{n}." for n in layers))]
    check_same(compute(placed), wanted)


@pytest.mark.slow
def test_tied_embeddings_and_learned_positions_come_from_a_disk(tmp_path: Path) -> None:
    model = make_model("gpt2")
    wanted = compute(model)
    model.save_pretrained(tmp_path / "model")
    placed: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    check_same(compute(placed), wanted)


def test_maps_that_place_a_part_twice_are_refused(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"device_map places llm in \(the model\) and apart"):
        AutoModelForCausalLM.from_pretrained(
            saved[0], device_map={"llm": "disk", "": "cpu"}, offload_folder=tmp_path
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_of_any_llm_is_split(family: str) -> None:
    llm = AutoModelForCausalLM.from_config(tiny_config(family))
    classes = list_layer_classes(llm)
    whole = [name for name, part in llm.named_modules() if type(part).__name__ in classes]
    assert len(whole) == 2
    sizes = {name: count_bytes(part) for name, part in llm.named_modules()}
    for share in (3, 5, 7):
        room = max(*(sizes[name] + 1 for name in whole), sizes[""] * share // 8)
        places = infer_auto_device_map(llm, {"cpu": room}, no_split_module_classes=list(classes))
        assert "disk" in places.values()
        assert not [place for place in places if place.startswith(tuple(f"{n}." for n in whole))]


def test_a_model_names_its_own_blocks_and_the_layers_of_its_llm() -> None:
    model = make_model("llama")
    assert model._no_split_modules == ["EncoderBlock", "LlamaDecoderLayer", "UPMBlock"]


def count_bytes(module: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
