"""The encoder against open_clip's own visual transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packs import relative

from onellm_dist.common.errors import OneLLMError
from onellm_dist.model.configuration import OneLLMVisionConfig
from onellm_dist.model.encoder import Encoder
from onellm_dist.model.sequence_lengths import SequenceLengths
from onellm_dist.model.weights.towers import from_open_clip_state

open_clip = pytest.importorskip("open_clip")


def theirs(act: str) -> Any:
    from open_clip.transformer import QuickGELU, VisionTransformer

    torch.manual_seed(0)
    layer = QuickGELU if act == "quick_gelu" else torch.nn.GELU
    model = VisionTransformer(
        image_size=224,
        patch_size=14,
        width=64,
        layers=2,
        heads=4,
        mlp_ratio=4.0,
        output_dim=32,
        act_layer=layer,
        output_tokens=True,
    )
    # Fresh norms and biases are 1 and 0: wrong ones would not show.
    for p in model.parameters():
        p.data.add_(0.05 * torch.randn(p.shape))
    return model.eval()


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_equals_open_clips_visual_transformer(act: str) -> None:
    reference = theirs(act)
    encoder = Encoder(OneLLMVisionConfig(width=64, layers=2, heads=4, act=act, output_dim=32))
    encoder.load_state_dict(from_open_clip_state(reference.state_dict()))
    images = torch.randn(3, 3, 224, 224)
    with torch.no_grad():
        # open_clip pools (class token @ proj) and returns the other tokens after ln_post
        pooled, tokens = reference(images)
        ours = encoder.encode_images(images)
    assert ours.shape == (3, 257, 64)
    assert relative(ours[:, 1:], tokens) < 1e-5
    assert relative(ours[:, 0] @ encoder.proj.weight, pooled) < 1e-5


def test_tokens_of_one_image_do_not_see_another() -> None:
    """open_clip >= 2.26 is batch-first; the reference feeds it otherwise and mixes images."""
    encoder = Encoder(OneLLMVisionConfig(width=64, layers=2, heads=4, output_dim=32))
    encoder.load_state_dict(from_open_clip_state(theirs("quick_gelu").state_dict()))
    images = torch.randn(2, 3, 224, 224)
    changed = images.clone()
    changed[1] += 1
    with torch.no_grad():
        before, after = encoder.encode_images(images), encoder.encode_images(changed)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_sequences_of_any_lengths_share_a_pack() -> None:
    encoder = Encoder(OneLLMVisionConfig(width=64, layers=2, heads=4, output_dim=32))
    encoder.load_state_dict(from_open_clip_state(theirs("quick_gelu").state_dict()))
    lengths = [9, 257, 9, 31]
    x = torch.randn(sum(lengths), 64)
    with torch.no_grad():
        packed = encoder(x, SequenceLengths.from_lengths(lengths, device=x.device))
        alone = torch.cat(
            [
                encoder(part, SequenceLengths.from_lengths([len(part)], device=x.device))
                for part in x.split(lengths)
            ]
        )
    assert relative(packed, alone) < 1e-6


def test_vit_l_14_fits_without_a_key_left() -> None:
    from open_clip.transformer import VisionTransformer

    config = open_clip.get_model_config("ViT-L-14-quickgelu")
    vision = config["vision_cfg"]
    heads = vision["width"] // vision.get("head_width", 64)
    with torch.device("meta"):
        state = VisionTransformer(
            vision["image_size"],
            vision["patch_size"],
            vision["width"],
            vision["layers"],
            heads,
            4.0,
            output_dim=config["embed_dim"],
        ).state_dict()
        encoder = Encoder(OneLLMVisionConfig())
    ours = {name: tensor.shape for name, tensor in encoder.state_dict().items()}
    assert {name: tensor.shape for name, tensor in from_open_clip_state(state).items()} == ours


def test_other_towers_are_refused_by_name() -> None:
    with pytest.raises(OneLLMError, match=r"layer1\.0\.conv1\.weight"):
        from_open_clip_state(
            {"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}
        )
