"""Any plain ViT of timm or open_clip gives its own forward's numbers over packed tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from packs import relative
from stage_setup import freeze_for_stage
from timm.models.vision_transformer import ParallelScalingBlock

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.convert.assemble import UPMSizes, assemble
from onellm_dist.data.costs import CostModel
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.modalities.transforms.crops import CLIP_MEAN, CLIP_STD
from onellm_dist.model import OneLLMConfig, OneLLMForConditionalGeneration, build_config, load_model
from onellm_dist.model.configuration import OneLLMUPMConfig
from onellm_dist.model.encoder import Encoder
from onellm_dist.model.initialisation import initialise
from onellm_dist.model.sequence_lengths import SequenceLengths
from onellm_dist.model.weights.towers import convert_tower
from onellm_dist.packed import IGNORE, PackedBatch

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 0}
TIMM: dict[str, dict[str, Any]] = {
    "vit_large_patch14_dinov2": {"img_size": 70, "init_values": 0.3},
    "vit_large_patch14_reg4_dinov2": {"img_size": 56, "init_values": 0.3},
    "vit_giant_patch14_dinov2": {"img_size": 56, "init_values": 0.3},
    "vit_base_patch16_224": {"img_size": 64},
    "vit_base_patch32_clip_224": {"img_size": 96},
    "vit_base_patch16_siglip_224": {"img_size": 48},
    "deit3_base_patch16_224": {"img_size": 48, "init_values": 0.2},
    "vit_base_patch8_224": {"img_size": 40, "qkv_bias": False},
}
"""DINOv2 (layer scale), with registers, with a gated MLP; a plain one; CLIP's pre-norm; no class
token; positions of patches alone; no bias."""
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "plain": {"act_layer": torch.nn.GELU},
    "large_patches": {"patch_size": 32, "image_size": 96, "act_layer": torch.nn.GELU},
    "layer_scale": {"ls_init_value": 0.4, "act_layer": torch.nn.GELU},
    "no_pre_norm": {"no_ln_pre": True, "act_layer": torch.nn.GELU},
    "sin_cos": {
        "pos_embed_type": "sin_cos_2d",
        "pool_type": "avg",
        "final_ln_after_pool": True,
        "act_layer": torch.nn.GELU,
    },
    "pooler": {
        "attentional_pool": True,
        "attn_pooler_queries": 4,
        "attn_pooler_heads": 2,
        "act_layer": torch.nn.GELU,
    },
}


def shaken(tower: Any) -> Any:
    """Every parameter away from 0 and 1: a norm, bias or scale that is left out shows."""
    for parameter in tower.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return tower.eval()


def timm_tower(name: str) -> Any:
    torch.manual_seed(0)
    return shaken(timm.create_model(name, pretrained=False, **{**SMALL, **TIMM[name]}))


@pytest.mark.parametrize("name", TIMM)
def test_equals_timms_own_forward(name: str) -> None:
    tower = timm_tower(name)
    config, weights = convert_tower(tower)
    encoder = Encoder(config)
    encoder.load_state_dict(weights)
    images = torch.randn(3, 3, TIMM[name]["img_size"], TIMM[name]["img_size"])
    with torch.no_grad():
        theirs, ours = tower.forward_features(images), encoder.encode_images(images)
    assert ours.shape == theirs.shape == (3, config.prefix + config.patches, 48)
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_equals_open_clips_own_forward(name: str) -> None:
    from open_clip.transformer import VisionTransformer

    torch.manual_seed(0)
    sizes = {
        "image_size": 56,
        "patch_size": 14,
        "width": 48,
        "layers": 2,
        "heads": 4,
        "mlp_ratio": 4.0,
        "output_dim": 48,
    }
    tower = shaken(VisionTransformer(**{**sizes, **OPEN_CLIP[name]}))
    config, weights = convert_tower(tower)
    encoder = Encoder(config)
    encoder.load_state_dict(weights)
    images = torch.randn(2, 3, config.image_size, config.image_size)
    with torch.no_grad():
        theirs = tower.transformer(tower._embeds(images))
        if config.post_norm:
            theirs = tower.ln_post(theirs)
        ours = encoder.encode_images(images)
    assert config.post_norm == (name not in ("sin_cos", "pooler"))
    assert relative(ours, theirs) < 1e-5


def test_the_real_dinov2_has_its_shapes_and_statistics() -> None:
    with torch.device("meta"):
        config, weights = convert_tower(
            timm.create_model("vit_large_patch14_dinov2", pretrained=False, num_classes=0)
        )
        encoder = Encoder(config)
    assert {name: tensor.shape for name, tensor in weights.items()} == {
        n: p.shape for n, p in encoder.state_dict().items()
    }
    assert (
        config.width,
        config.layers,
        config.patches,
        config.prefix,
        config.layer_scale,
        config.pre_norm,
    ) == (
        1024,
        24,
        37 * 37,
        1,
        True,
        False,
    )
    assert config.image_mean == [0.485, 0.456, 0.406] and not config.clip


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: timm.create_model("resnet18"), "ResNet is not a vision transformer"),
        (lambda: timm.create_model("vit_tiny_patch16_224", qk_norm=True), "q_norm, k_norm"),
        (
            lambda: timm.create_model(
                "vit_base_patch32_plus_256",
                img_size=64,
                embed_dim=48,
                depth=1,
                num_heads=4,
                global_pool="avg",
            ),
            "",
        ),
        (
            lambda: timm.create_model(
                "vit_tiny_patch16_224", depth=1, block_fn=ParallelScalingBlock
            ),
            "plain",
        ),
    ],
    ids=["resnet", "qk_norm", "avg_pool_is_fine", "parallel"],
)
def test_what_the_encoder_cannot_run_is_refused(make: Any, says: str) -> None:
    if not says:
        config, _ = convert_tower(make())
        assert not config.post_norm, "timm moves the norm behind the pooling"
        return
    with pytest.raises(OneLLMError, match=says):
        convert_tower(make())


def test_pictures_are_given_as_the_encoder_was_trained_on_them() -> None:
    config, _ = convert_tower(timm_tower("vit_large_patch14_dinov2"))
    encoder = Encoder(config)
    pixels = torch.rand(2, 3, 224, 224)
    mean, std, own_mean, own_std = (
        torch.tensor(v)[:, None, None]
        for v in (CLIP_MEAN, CLIP_STD, config.image_mean, config.image_std)
    )
    got = encoder.normalise_frames((pixels - mean) / std)
    wanted = torch.nn.functional.interpolate(
        (pixels - own_mean) / own_std, (70, 70), mode="bicubic", antialias=True
    )
    assert relative(got, wanted) < 1e-5
    assert encoder.normalise_frames(torch.zeros(0, 3, 224, 224)).shape == (0, 3, 70, 70)
    clip = Encoder(build_config("toy").vision)
    assert clip.normalise_frames(pixels) is pixels


def one_of_each(names: list[str]) -> PackedBatch:
    generator = torch.Generator().manual_seed(3)
    kinds = all_modalities()
    values = {
        m: torch.randn((names.count(m), *kind.value_shape), generator=generator)
        for m, kind in kinds.items()
    }
    ids = torch.randint(3, 400, (6 * len(names),), generator=generator)
    labels = ids.clone()
    labels[::6] = IGNORE
    return PackedBatch(
        ids,
        labels,
        (6,) * len(names),
        tuple((name,) for name in names),
        values,
        torch.ones(len(names)),
    )


@pytest.fixture(scope="module")
def with_registers() -> Any:
    """The toy model around a DINOv2 with registers."""
    vision, weights = convert_tower(timm_tower("vit_large_patch14_reg4_dinov2"))
    toy = build_config("toy")
    upm = OneLLMUPMConfig(experts=2, blocks=2, heads=4, ffn=64, router_hidden=64)
    model = OneLLMForConditionalGeneration(
        OneLLMConfig(vision=vision, upm=upm, text_config=toy.text_config)
    )
    initialise(model, 0)
    model.encoder.load_state_dict(weights)
    return model


def test_every_modality_goes_through_it_and_packing_changes_nothing(with_registers: Any) -> None:
    names = ["image", "imu", "depth", "fmri"]
    model = with_registers.eval()
    batch = one_of_each(names)
    with torch.no_grad():
        together = model(packed=batch).nll.split(5)
        for i, name in enumerate(names):
            values = {m: v[:1] if m == name else v[:0] for m, v in batch.values.items()}
            rows = slice(6 * i, 6 * i + 6)
            alone = PackedBatch(
                batch.input_ids[rows], batch.labels[rows], (6,), ((name,),), values, torch.ones(1)
            )
            assert relative(model(packed=alone).nll, together[i]) < 1e-5
    tokens = model.tokenizers["imu"](batch.values["imu"], model.encoder.prepend_prefix)
    assert tokens.shape == (1, 1 + 4 + 391, 48)


@pytest.mark.parametrize("trains", [False, True])
def test_the_encoder_trains_or_does_not(with_registers: Any, trains: bool) -> None:
    freeze_for_stage(with_registers, "align", {"image", "imu"}, encoder=trains)
    for names in (["image"], ["imu"]):
        with_registers.zero_grad()
        with_registers(packed=one_of_each(names)).loss.backward()
        moved = {
            name
            for name, p in with_registers.encoder.named_parameters()
            if p.grad is not None and p.grad.abs().max() > 0
        }
        own = {name for name, _ in with_registers.encoder.named_parameters()}
        of_pictures = {name for name in own if name.startswith(("patches.", "positions."))}
        expected = (own - of_pictures if names == ["imu"] else own) if trains else set()
        assert moved == expected
    clip, _ = load_model(path=None, preset="toy", seed=0)
    freeze_for_stage(clip, "align", {"image"}, encoder=True)
    assert not clip.encoder.proj.weight.requires_grad, "nothing computes with it"


def test_the_plan_counts_the_tokens_that_it_makes() -> None:
    image, imu = (
        get_modality(name).with_encoder(patches=196, prefix_tokens=5) for name in ("image", "imu")
    )
    assert (image.encoder_tokens, image.upm_tokens, imu.encoder_tokens) == (201, 231, 396)
    assert (
        get_modality("video").with_encoder(patches=196, prefix_tokens=5).encoder_tokens == 15 * 201
    )
    assert get_modality("image").encoder_tokens == 257
    assert CostModel().media([image]) < CostModel().media([get_modality("image")])
    assert image.value_shape == get_modality("image").value_shape


@pytest.mark.seconds
def test_a_tower_by_name_is_assembled_from_a_file(tmp_path: Path) -> None:
    name = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    tower = shaken(timm.create_model(name, pretrained=False, img_size=64))
    torch.save(tower.state_dict(), tmp_path / "tiny.pth")
    llm, processor = load_model(path=None, preset="toy", seed=0)
    llm.llm.save_pretrained(tmp_path / "llm")
    processor.tokenizer.save_pretrained(tmp_path / "llm")
    spec = f"timm:{name}?img_size=64@{tmp_path / 'tiny.pth'}"
    sizes = UPMSizes(experts=1, blocks=1, heads=3)
    assemble(
        tmp_path / "model",
        llm=tmp_path / "llm",
        encoder=spec,
        upm=sizes,
        modalities=["image"],
        quiet=True,
    )
    model, _ = load_model(path=tmp_path / "model", preset=None, seed=0)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert (
            relative(model.encoder.encode_images(images), tower.eval().forward_features(images))
            < 1e-5
        )
        features = model.encode({"image": torch.randn(1, 3, 224, 224)})[0]["image"]
    assert features.shape == (1, 30, 128)
    assert model.config.vision.image_mean == [0.5, 0.5, 0.5]
    with pytest.raises(UsageError, match="no file"):
        assemble(
            tmp_path / "other", llm=tmp_path / "llm", encoder=f"timm:{name}@nowhere.pth", quiet=True
        )
    with pytest.raises(UsageError, match="does not name a tower"):
        assemble(tmp_path / "other", llm=tmp_path / "llm", encoder="timm:", quiet=True)


def test_segments_of_any_lengths_share_a_pack() -> None:
    config, weights = convert_tower(timm_tower("vit_giant_patch14_dinov2"))
    encoder = Encoder(config)
    encoder.load_state_dict(weights)
    lengths = [3, 17, 3]
    x = torch.randn(sum(lengths), 48)
    with torch.no_grad():
        packed = encoder(x, SequenceLengths.from_lengths(lengths, device=x.device))
        alone = torch.cat(
            [
                encoder(part, SequenceLengths.from_lengths([len(part)], device=x.device))
                for part in x.split(lengths)
            ]
        )
    assert relative(packed, alone) < 1e-5
