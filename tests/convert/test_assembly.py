"""Models put together, extended, compared and inspected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import clip, llama, onellm, save_meta, save_onellm, save_open_clip
from safetensors.torch import save_file

from onellm_dist.cli.convert_commands import run_verify
from onellm_dist.common.errors import UsageError
from onellm_dist.convert.assemble import UPMSizes, assemble
from onellm_dist.convert.checkpoint import ConversionOptions
from onellm_dist.convert.extend import Additions
from onellm_dist.convert.inspect import describe_checkpoint
from onellm_dist.convert.opening import open_checkpoint
from onellm_dist.convert.verify import compare
from onellm_dist.modalities import get_modality
from onellm_dist.model import OneLLMForConditionalGeneration, load_model
from onellm_dist.model.presets import load_toy_tokenizer

SIZES = UPMSizes(experts=2, blocks=1, heads=4, ffn=96, router_hidden=48)
IDS = torch.arange(3, 15)[None]


def load(path: Path) -> OneLLMForConditionalGeneration:
    model: OneLLMForConditionalGeneration = OneLLMForConditionalGeneration.from_pretrained(path)
    model.train(mode=False)
    return model


def value(name: str) -> torch.Tensor:
    return torch.randn(
        (1, *get_modality(name).value_shape), generator=torch.Generator().manual_seed(4)
    )


@torch.no_grad()
def logits(model: OneLLMForConditionalGeneration, name: str) -> torch.Tensor:
    out: torch.Tensor = model(IDS, **{f"{name}_values": value(name)}).logits
    return out


def test_an_llm_and_an_encoder_make_a_model_ready_to_align(tmp_path: Path) -> None:
    """Meta's LLaMA and transformers' CLIP keep their weights; `initialise` draws the rest."""
    language, tower = llama(), clip()
    save_meta(tmp_path / "llama", language)
    tower.save_pretrained(tmp_path / "clip")
    load_toy_tokenizer().save_pretrained(tmp_path / "words")
    modalities = ["image", "imu"]
    opened, record = assemble(
        tmp_path / "start",
        llm=tmp_path / "llama",
        encoder=tmp_path / "clip",
        upm=SIZES,
        modalities=modalities,
        seed=3,
        options=ConversionOptions(tokenizer=tmp_path / "words"),
        quiet=True,
    )
    model, _ = load_model(path=tmp_path / "start", preset=None, seed=0)
    fresh = onellm(modalities=("image", "imu"), seed=3).state_dict()
    for name, tensor in model.named_parameters():
        if name.startswith("llm."):
            assert torch.equal(tensor, language.state_dict()[name.removeprefix("llm.")])
        elif not name.startswith("encoder."):
            assert torch.equal(tensor, fresh[name]), name
    assert torch.equal(
        model.state_dict()["encoder.blocks.1.mlp.up.weight"],
        tower.state_dict()["vision_model.encoder.layers.1.mlp.fc1.weight"],
    )
    assert set(record["initialised"]) == {
        n for n, _ in model.named_parameters() if not n.startswith(("llm.", "encoder."))
    }
    assert opened.config.modalities == modalities
    assert torch.equal(model.llm(IDS).logits, language(IDS).logits)


def test_metas_sentencepiece_model_becomes_the_processor(tmp_path: Path) -> None:
    """Meta's folder holds tokenizer.model and nothing else of a tokenizer."""
    import sentencepiece

    language = llama()
    save_meta(tmp_path / "llama", language)
    (tmp_path / "words.txt").write_text(
        "a red cube left of a blue ball\na dog runs and a person claps\n" * 40
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"),
        model_prefix=str(tmp_path / "llama" / "tokenizer"),
        vocab_size=48,
        model_type="bpe",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    clip().save_pretrained(tmp_path / "clip")
    assemble(
        tmp_path / "start",
        llm=tmp_path / "llama",
        encoder=tmp_path / "clip",
        upm=SIZES,
        modalities=["image"],
        quiet=True,
    )
    _, processor = load_model(path=tmp_path / "start", preset=None, seed=0)
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(tmp_path / "llama" / "tokenizer.model")
    )
    text = "a red dog claps"
    assert processor(text=text)["input_ids"][0].tolist() == [1, *pieces.encode(text)]
    assert processor.tokenizer.eos_token_id == 2


@pytest.mark.parametrize("router", ["soft", "sparse"])
def test_added_experts_and_modalities_leave_the_old_ones_alone(router: str, tmp_path: Path) -> None:
    save_onellm(tmp_path / "one", router=router)
    before = load(tmp_path / "one")
    opened, _ = assemble(
        tmp_path / "more",
        base=tmp_path / "one",
        additions=Additions(experts=2, modalities=["depth", "audio"]),
        seed=1,
        quiet=True,
    )
    after = load(tmp_path / "more")
    assert opened.config.upm.experts == 4
    assert after.config.modalities == ["image", "audio", "depth", "imu"]
    for name in ("image", "imu"):
        assert torch.allclose(logits(after, name), logits(before, name), atol=1e-6, rtol=1e-5)
    assert torch.isfinite(logits(after, "audio")).all()
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    assert all(torch.equal(new[n], old[n]) for n in old if "router.fc2" not in n)
    first, *added = (new[f"upm.experts.{k}.blocks.0.attention.q.weight"] for k in (0, 2, 3))
    assert all(0.005 < ((expert - first) / first).std() < 0.02 for expert in added), (
        "copies of the first with a hundredth of noise"
    )
    assert not torch.equal(*added), "with equal router weights, equal experts would stay equal"
    assert torch.equal(
        new["upm.experts.3.blocks.0.attention_norm.weight"],
        old["upm.experts.0.blocks.0.attention_norm.weight"],
    )
    assert torch.equal(
        new["projectors.depth.queries.weight"], old["projectors.image.queries.weight"]
    )
    depth, image = after.get_projector("depth"), after.get_projector("image")
    weights = depth.router(depth.queries())
    if router == "soft":
        assert (weights[:, 2:] > 0.05).all(), "a new modality may use the new experts"
        assert (image.router(image.queries())[:, 2:] < 1e-8).all()


def test_copies_are_exact_where_asked_for(tmp_path: Path) -> None:
    save_onellm(tmp_path / "one")
    assemble(
        tmp_path / "more",
        base=tmp_path / "one",
        additions=Additions(experts=1, expert_noise=0.0),
        quiet=True,
    )
    new = dict(load(tmp_path / "more").named_parameters())
    assert torch.equal(
        new["upm.experts.2.blocks.0.attention.q.weight"],
        new["upm.experts.0.blocks.0.attention.q.weight"],
    )


def test_random_experts_are_the_seeds(tmp_path: Path) -> None:
    save_onellm(tmp_path / "one")
    assemble(
        tmp_path / "more",
        base=tmp_path / "one",
        additions=Additions(experts=1, expert_init="separate"),
        seed=7,
        quiet=True,
    )
    name = "upm.experts.2.blocks.0.attention.q.weight"
    assert torch.equal(
        dict(load(tmp_path / "more").named_parameters())[name],
        dict(onellm(experts=3, seed=7).named_parameters())[name],
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "--llm and --encoder are both needed"),
        ({"base": "one", "additions": Additions(modalities=["smell"])}, "unknown modality smell"),
        ({"base": "one", "additions": Additions(modalities=["imu"])}, "has imu already"),
        ({"base": "one", "llm": "one"}, "exclude each other"),
        ({"base": "constant", "additions": Additions(experts=1)}, "the router is constant"),
        ({"llm": "llama", "encoder": "llama"}, "is a language model, not a CLIP encoder"),
        (
            {"base": "llama", "additions": Additions(experts=1)},
            "is a language model, not a complete OneLLM",
        ),
    ],
)
@pytest.mark.seconds
def test_what_cannot_be_assembled(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_onellm(tmp_path / "one")
    save_onellm(tmp_path / "constant", router="constant")
    llama().save_pretrained(tmp_path / "llama")
    given: dict[str, Any] = {
        key: tmp_path / v if isinstance(v, str) else v for key, v in arguments.items()
    }
    with pytest.raises(UsageError, match=words):
        assemble(tmp_path / "out", quiet=True, **given)


def verify(a: Path, b: Path, **arguments: Any) -> int:
    fixed: dict[str, Any] = {
        "logits": False,
        "inputs": None,
        "tolerance": 0.0,
        "seed": 0,
        "from_a": None,
        "from_b": None,
    }
    return run_verify(a, b, ConversionOptions(), **{**fixed, **arguments})


def test_verify_between_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = llama()
    save_meta(tmp_path / "meta", model)
    model.save_pretrained(tmp_path / "hf")
    assert verify(tmp_path / "meta", tmp_path / "hf", logits=True) == 0
    assert "logits: up to 0 apart" in capsys.readouterr().out
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 0.25
    model.save_pretrained(tmp_path / "hf")
    assert verify(tmp_path / "meta", tmp_path / "hf") == 1
    assert "model.layers.1.mlp.up_proj.weight: up to 0.25 apart" in capsys.readouterr().out
    assert verify(tmp_path / "meta", tmp_path / "hf", tolerance=0.3) == 0
    save_file({"input_ids": IDS}, tmp_path / "inputs.safetensors")
    assert (
        verify(
            tmp_path / "meta",
            tmp_path / "hf",
            inputs=tmp_path / "inputs.safetensors",
            tolerance=1e-9,
        )
        == 1
    )
    assert "logits: up to" in capsys.readouterr().out


def test_verify_and_inspect_of_a_complete_model(tmp_path: Path) -> None:
    save_onellm(tmp_path / "one")
    a, b = (
        open_checkpoint(tmp_path / "one", ConversionOptions()),
        open_checkpoint(tmp_path / "one", ConversionOptions()),
    )
    found = compare(a, b, logits=True)
    assert found.is_equal(0)
    assert found.logits == 0
    lines = "\n".join(describe_checkpoint(a))
    assert "format onellm: a complete OneLLM" in lines
    assert "modalities: image, imu" in lines
    parameters = sum(p.numel() for p in onellm().parameters())
    assert f"{parameters:,} parameters" in lines
    assert "no part is missing" in lines
    folder, _ = save_open_clip(tmp_path / "clip")
    assert "a CLIP encoder" in describe_checkpoint(open_checkpoint(folder, ConversionOptions()))[0]
