"""The code in a saved folder: the model and its processor where the package is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from packs import small_model
from PIL import Image

from onellm_dist.common.placeholders import list_medium_spans
from onellm_dist.modalities import all_modalities, registry
from onellm_dist.model import OneLLMForConditionalGeneration, OneLLMProcessor
from onellm_dist.model.folder_code import files
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.presets import load_toy_tokenizer

SCRIPT = Path(__file__).with_name("without_package.py")


def write_media(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8)).save(folder / "x.png")
    wave = np.sin(np.arange(16000) * 0.05).astype(np.float32)
    soundfile.write(folder / "x.flac", wave, 16000)
    return {"image": str(folder / "x.png"), "audio": str(folder / "x.flac")}


@pytest.mark.slow
def test_a_folder_loads_without_the_package_and_gives_the_same(tmp_path: Path) -> None:
    processor = OneLLMProcessor(load_toy_tokenizer())
    config = small_model(words=len(processor.tokenizer)).config
    config.span_positions = "learned"
    model: Any = OneLLMForConditionalGeneration(config)
    initialise(model, 3)
    torch.nn.init.normal_(model.get_projector("image").span_positions.weight)
    model.eval()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    values = {
        f"{n}_values": torch.randn(2 if n == "image" else 1, *m.value_shape)
        for n, m in all_modalities().items()
    }
    spans = [*((name, 1) for name in all_modalities()), *list_medium_spans("image", 3, 2)[1:]]
    inputs: dict[str, Any] = {**processor(text="a red circle"), **values, "media_spans": [spans]}
    media = write_media(tmp_path)
    torch.save({"inputs": inputs, "files": media}, tmp_path / "given.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment.pop("PYTHONPATH", None)
    subprocess.run([sys.executable, str(SCRIPT), str(tmp_path)], check=True, env=environment)
    found = torch.load(tmp_path / "found.pt")
    assert "onellm_dist" not in found["modules"]
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.testing.assert_close(found["logits"], logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["again"], logits, atol=1e-5, rtol=0)
    for name, file in media.items():
        mine = processor(text="What is it?", **{name: file})
        assert torch.equal(found[name], model.generate(**mine, max_new_tokens=8))
    for name in files.build_files():  # saved again by itself, the code is still the same
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_the_code_is_the_packages_own_text() -> None:
    space: dict[str, Any] = {"__name__": "code", "__file__": "code.py", "__spec__": None}
    text = files.build_files()["onellm_code.py"]
    before = list(sys.path_hooks)
    try:
        exec(compile(text, "code.py", "exec"), space)
    finally:
        sys.path_hooks[:] = before
    package = Path(files.__file__).parents[2]
    for name, source in space["SOURCES"].items():
        path = package / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        assert path.read_text(encoding="utf-8") == source
    assert {f"modalities.{name}" for name in all_modalities()} <= set(space["SOURCES"])


def test_config_and_processor_name_their_code(tmp_path: Path) -> None:
    small_model(modalities=["imu"]).config.save_pretrained(tmp_path)
    OneLLMProcessor(load_toy_tokenizer()).save_pretrained(tmp_path)
    for file in ("config.json", "processor_config.json"):
        named = json.loads((tmp_path / file).read_text())["auto_map"]
        for auto, place in named.items():
            module, cls = place.split(".")
            assert auto.startswith("Auto") and f"\n{cls} = " in (
                tmp_path / f"{module}.py"
            ).read_text(encoding="utf-8")


def test_code_of_other_packages_is_not_given_away(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = type(all_modalities()["imu"])
    foreign = type("Thermal", (base,), {"name": "thermal", "order": 90, "__module__": "thermal"})()
    known = {**all_modalities(), "thermal": foreign}
    monkeypatch.setattr(registry, "all_modalities", lambda: known)
    config = small_model(modalities=["imu"]).config
    config.modalities = ["imu", "thermal"]
    config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    OneLLMProcessor(load_toy_tokenizer()).save_pretrained(tmp_path)
    assert OneLLMProcessor.from_pretrained(tmp_path).tokenizer.eos_token
