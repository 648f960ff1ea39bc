"""Checkpoints of the reference, complete and broken."""

from __future__ import annotations

import importlib.util
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from onellm_dist.common.errors import UsageError
from onellm_dist.convert.checkpoint import ConversionOptions, OpenedCheckpoint
from onellm_dist.convert.conversion import convert
from onellm_dist.convert.formats.reference import build_config_from_shapes
from onellm_dist.convert.names.reference import from_reference_name
from onellm_dist.model import OneLLMForConditionalGeneration, build_meta_model, load_model
from onellm_dist.model.presets import load_toy_tokenizer

DATA = Path(__file__).parents[2] / "fixtures" / "parity"
HEADS = ConversionOptions(encoder_heads=4, upm_heads=4, llm_heads=4)

Tensors = dict[str, torch.Tensor]


def convert_reference(
    source: Path, out: Path, options: ConversionOptions = HEADS
) -> OpenedCheckpoint:
    opened, _ = convert("reference", source, out, options=options, quiet=True)
    return opened


@pytest.fixture(scope="module")
def weights() -> Tensors:
    spec = importlib.util.spec_from_file_location("parity_weights", DATA / "weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    built: Tensors = module.weights(DATA / "manifest.json")
    recorded = json.loads((DATA / "manifest.json").read_text())
    for key in ("llma.norm.weight", "llma.conv1.imu.weight", "llma.clip.visual.proj"):
        assert built[key].double().sum().item() == pytest.approx(recorded[key]["sum"], rel=1e-6)
    return built


@pytest.mark.seconds
def test_safetensors_and_training_checkpoints_give_the_same(
    weights: Tensors, tmp_path: Path
) -> None:
    save_file(weights, tmp_path / "a.safetensors")
    torch.save({"model": weights, "epoch": 3}, tmp_path / "b.pth")
    done = [
        convert_reference(tmp_path / f, tmp_path / f"out{f[0]}") for f in ("a.safetensors", "b.pth")
    ]
    counts = [sum(tensor.numel for tensor in opened.tensors.values()) for opened in done]
    assert counts[0] == counts[1]
    assert counts[0] == sum(v.numel() for k, v in weights.items() if k not in done[0].ignored)
    assert done[0].ignored == done[1].ignored
    assert set(done[0].ignored) == {
        k for k in weights if k.startswith("llma.clip.") and "visual" not in k
    }
    a, b = (
        OneLLMForConditionalGeneration.from_pretrained(tmp_path / f"out{f}").state_dict()
        for f in "ab"
    )
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.seconds
def test_a_tokenizer_makes_the_directory_complete(weights: Tensors, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "c.pth")
    load_toy_tokenizer().save_pretrained(tmp_path / "words")
    convert_reference(tmp_path / "c.pth", tmp_path / "alone")
    assert not (tmp_path / "alone" / "tokenizer.json").exists()
    with pytest.raises(UsageError, match="no tokenizer in"):
        load_model(path=tmp_path / "alone", preset=None, seed=0)
    with_tokenizer = replace(HEADS, tokenizer=tmp_path / "words")
    convert_reference(tmp_path / "c.pth", tmp_path / "complete", with_tokenizer)
    _, processor = load_model(path=tmp_path / "complete", preset=None, seed=0)
    assert processor.tokenizer.bos_token_id == 1


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "all"])
def test_keys_that_do_not_fit_are_all_named(weights: Tensors, fault: str, tmp_path: Path) -> None:
    broken, expected = dict(weights), []
    if fault in ("missing", "all"):
        del broken["llma.routers.rgbd.fc1.bias"], broken["llma.layers.1.attention.wq.weight"]
        expected += [
            "missing key projectors.depth.router.fc1.bias",
            "missing key llm.model.layers.1.self_attn.q_proj.weight",
        ]
    if fault in ("unknown", "all"):
        broken["llma.routers.smell.fc1.bias"] = torch.zeros(3)
        expected.append("unknown key llma.routers.smell.fc1.bias [3]")
    if fault in ("shape", "all"):
        broken["llma.positional_embedding.imu"] = torch.zeros(2, 64)
        expected.append(
            "llma.positional_embedding.imu has shape [2, 64], the model needs [392, 64]"
        )
    torch.save(broken, tmp_path / "c.pth")
    with pytest.raises(UsageError) as caught:
        convert_reference(tmp_path / "c.pth", tmp_path / "out")
    assert all(line in str(caught.value) for line in expected)
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_checkpoints(weights: Tensors, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no checkpoint"):
        convert_reference(tmp_path / "none.pth", tmp_path / "out")
    (tmp_path / "text.pth").write_text("no checkpoint")
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00")
    (tmp_path / "code.pth").write_bytes(pickle.dumps({"x": Path("code")}))
    torch.save({"x": 3}, tmp_path / "numbers.pth")
    for name in ("text.pth", "half.safetensors", "code.pth", "numbers.pth"):
        with pytest.raises(UsageError, match="cannot be read"):
            convert_reference(tmp_path / name, tmp_path / "out")
    torch.save({"layers.0.attention.wq.weight": torch.zeros(2, 2)}, tmp_path / "llama.pth")
    with pytest.raises(UsageError, match=r"no key llma\.tok_embeddings\.weight"):
        convert_reference(tmp_path / "llama.pth", tmp_path / "out")


def test_nothing_is_overwritten(weights: Tensors, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "c.pth")
    with pytest.raises(UsageError, match="is not empty"):
        convert_reference(tmp_path / "c.pth", tmp_path)


def test_the_papers_checkpoint_has_the_papers_shapes() -> None:
    """The 940 keys of OneLLM-7B: every key finds its parameter, heads are 16, 16 and 32."""
    model = build_meta_model("onellm-7b")
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    keys = _keys_of_the_7b()
    shapes = {
        key: parameters[name] for key in keys if (name := from_reference_name(key)) is not None
    }
    shapes["conv1.point.conv1.weight"] = (1024, 6, 1, 1)
    config = build_config_from_shapes(shapes, Path("7b"), None, None, None)
    assert len(keys) == 940
    assert {from_reference_name(key) for key in keys} - {None} == set(parameters)
    assert len([key for key in keys if from_reference_name(key) is None]) == 6
    assert (config.vision.heads, config.upm.heads, config.text_config.num_attention_heads) == (
        16,
        16,
        32,
    )
    for part in ("vision", "upm"):
        assert getattr(config, part).to_dict() == getattr(model.config, part).to_dict()
    assert config.text_config.to_dict() == model.config.text_config.to_dict()


def _keys_of_the_7b() -> list[str]:
    """Keys of the small checkpoint with 32 blocks of the LLM, 24 of CLIP, 8 of the UPM."""
    small = [key.removeprefix("llma.") for key in json.loads((DATA / "manifest.json").read_text())]
    keys = {
        key
        for key in small
        if not key.startswith(("layers.", "clip.visual.transformer.", "resample_layers."))
    }
    for key in small:
        parts = key.split(".")
        if key.startswith("layers."):
            keys |= {".".join(["layers", str(i), *parts[2:]]) for i in range(32)}
        elif key.startswith("clip.visual.transformer."):
            keys |= {".".join([*parts[:4], str(i), *parts[5:]]) for i in range(24)}
        elif key.startswith("resample_layers."):
            keys |= {".".join([*parts[:2], str(i), *parts[3:]]) for i in range(8)}
    return sorted(keys)
