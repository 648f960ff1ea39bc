"""Code that a model's folder brings along is never run, and nobody is asked whether to run it."""

from __future__ import annotations

import ast
import builtins
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packs import small_model
from transformers import LlamaConfig, LlamaForCausalLM

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.conversion import convert
from onellm_dist.convert.tokenizers import load_tokenizer
from onellm_dist.model import OneLLMProcessor
from onellm_dist.model.presets import load_model, load_toy_tokenizer
from onellm_dist.model.weights.lazy import open_model
from onellm_dist.shards.sources.readers.depth_models import check_model

ROOT = Path(__file__).parents[3]
CODE = """
from pathlib import Path
from transformers import PretrainedConfig, PreTrainedTokenizerFast
Path({marker!r}).write_text("it ran")
class Strange(PretrainedConfig, PreTrainedTokenizerFast):
    model_type = "strange"
"""
RUNS_OUR_CODE = "load_alone.py"
"""`convert publish` loads a folder as its users will, after it has held the code against ours."""
NAMES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForDepthEstimation")


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that the code would write, on a terminal where every question is answered by yes."""
    monkeypatch.setattr(builtins, "input", lambda *prompt: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "marker"
    yield marker
    assert not marker.exists()


def plant(folder: Path, marker: Path, *, tokenizer: bool, **config: Any) -> Path:
    """Let config or tokenizer of a folder name code of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "strange.py").write_text(CODE.format(marker=str(marker)))
    path = folder / ("tokenizer_config.json" if tokenizer else "config.json")
    content = json.loads(path.read_text()) if path.exists() else {}
    auto_map: dict[str, Any] = dict.fromkeys(NAMES, "strange.Strange")
    if tokenizer:
        content["tokenizer_class"] = "StrangeTokenizer"
        auto_map = {"AutoTokenizer": ["strange.Strange", "strange.Strange"]}
    path.write_text(json.dumps({**content, "auto_map": auto_map, **config}))
    return folder


def make_onellm(folder: Path) -> Path:
    small_model(words=len(load_toy_tokenizer()), modalities=["imu"]).save_pretrained(folder)
    OneLLMProcessor(load_toy_tokenizer()).save_pretrained(folder)
    return folder


def test_an_llm_of_its_own_code_is_refused(tmp_path: Path, marker: Path) -> None:
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
    ).save_pretrained(tmp_path / "llm")
    folder = plant(tmp_path / "llm", marker, tokenizer=False, model_type="strange")
    with pytest.raises(UsageError, match=r"code of its own.*\n.*never run here.*\nuse a model"):
        convert("hf", folder, tmp_path / "out", to="hf", quiet=True)
    # A class that transformers has is used, whatever else the folder names.
    plant(tmp_path / "llm", marker, tokenizer=False, model_type="llama")
    convert("hf", folder, tmp_path / "out", to="hf", quiet=True)


@pytest.mark.parametrize("load", [load_model, open_model])
def test_a_tokenizer_of_its_own_code_is_refused(
    tmp_path: Path, marker: Path, load: Callable[..., Any]
) -> None:
    folder = plant(make_onellm(tmp_path / "model"), marker, tokenizer=True)
    with pytest.raises(UsageError, match=r"Python code of their own.*\n.*never run here"):
        load(path=folder, preset=None, seed=0)
    with pytest.raises(UsageError, match="Python code of their own"):
        load_tokenizer(folder)
    assert not (tmp_path / "modules").exists()


def test_a_onellm_that_names_code_is_loaded_without_it(tmp_path: Path, marker: Path) -> None:
    folder = plant(make_onellm(tmp_path / "model"), marker, tokenizer=False)
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["auto_map"] = content["auto_map"]
    (folder / "config.json").write_text(json.dumps(content))
    load_model(path=folder, preset=None, seed=0)
    open_model(path=folder, preset=None, seed=0)


def test_a_depth_model_of_its_own_code_is_refused(tmp_path: Path, marker: Path) -> None:
    folder = plant(tmp_path / "depth", marker, tokenizer=False, model_type="strange")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"Python code of their own.*\n.*never run here"):
        check_model(folder)


@pytest.mark.seconds
def test_every_call_of_an_auto_class_says_that_no_code_is_run() -> None:
    """Also of our processor, which loads its tokenizer with AutoTokenizer."""
    found, silent = 0, []
    for folder in ("onellm_dist", "benchmarks", "examples"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                    continue
                owner, method = ast.unparse(call.func.value).split(".")[-1], call.func.attr
                if method not in ("from_pretrained", "from_config"):
                    continue
                if not owner.startswith("Auto") and owner != "OneLLMProcessor":
                    continue
                found += 1
                said = {k.arg: ast.unparse(k.value) for k in call.keywords}
                if path.name == RUNS_OUR_CODE:
                    assert said["trust_remote_code"] == "True"
                elif said.get("trust_remote_code") != "False":
                    silent.append(f"{path.relative_to(ROOT)}:{call.lineno}")
    assert not silent
    assert found > 12, "the search finds no calls"
