"""The tokenizer modules of the non-visual modalities, and the constants of all eight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.modalities.point import CENTRES, NEIGHBOURS, PointTokenizer
from onellm_dist.modalities.transforms.cloud_sampling import (
    find_nearest_neighbours,
    sample_farthest_points,
)

PARITY = load_file(Path(__file__).parents[1] / "fixtures/parity_preprocess/preprocess.safetensors")
WIDTH = 16
TRAINABLE = ("audio", "point", "imu", "fmri")


def test_the_eight_in_their_order_with_the_papers_token_counts() -> None:
    counts = {name: (m.encoder_tokens, m.upm_tokens) for name, m in all_modalities().items()}
    assert counts == {
        "image": (257, 287),
        "video": (15 * 257, 287),
        "audio": (1213, 1243),
        "point": (1025, 1055),
        "depth": (2 * 257, 287),
        "normal": (2 * 257, 287),
        "imu": (392, 422),
        "fmri": (9, 39),
    }
    assert list(counts) == ["image", "video", "audio", "point", "depth", "normal", "imu", "fmri"]


def test_visual_modalities_have_no_tokenizer_and_the_others_have() -> None:
    assert {name for name, m in all_modalities().items() if m.build_tokenizer(WIDTH) is None} == {
        "image",
        "video",
        "depth",
        "normal",
    }
    assert {name for name, m in all_modalities().items() if m.visual} == {
        "image",
        "video",
        "depth",
        "normal",
    }


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("audio", {"conv.weight": (1024, 1, 16, 16), "conv.bias": (1024,)}),
        ("point", {"conv.weight": (1024, 6, 1, 1), "conv.bias": (1024,)}),
        ("imu", {"conv.weight": (1024, 6, 10)}),
        ("fmri", {"linear.weight": (8192, 15724), "linear.bias": (8192,)}),
    ],
)
def test_parameters_have_the_reference_checkpoints_shapes(
    name: str, shapes: dict[str, tuple[int, ...]]
) -> None:
    with torch.device("meta"):
        module = get_modality(name).build_tokenizer(1024)
    assert module is not None
    assert {k: tuple(v.shape) for k, v in module.state_dict().items()} == shapes


@pytest.mark.parametrize("name", TRAINABLE)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_shapes_and_a_gradient_even_from_no_rows(name: str, n: int) -> None:
    modality = get_modality(name)
    module = modality.build_tokenizer(WIDTH)
    assert module is not None
    out = module(torch.rand(n, *modality.value_shape))
    assert out.shape == (n, modality.tokens, WIDTH)
    out.sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.abs().sum() > 0) == (n > 0)


@pytest.mark.parametrize("name", TRAINABLE)
def test_half_precision_weights_take_fp32_values(name: str) -> None:
    modality = get_modality(name)
    module = modality.build_tokenizer(WIDTH)
    assert module is not None
    values = torch.rand(1, *modality.value_shape)
    whole = module(values)
    half = module.bfloat16()(values)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), whole, atol=0.06, rtol=0.05)


@pytest.mark.parametrize("name", TRAINABLE)
def test_rows_of_a_pack_do_not_mix(name: str) -> None:
    modality = get_modality(name)
    module = modality.build_tokenizer(WIDTH)
    assert module is not None
    values = torch.rand(3, *modality.value_shape)
    torch.testing.assert_close(module(values)[1:2], module(values[1:2]), atol=1e-6, rtol=1e-5)


def test_audio_tokens_go_row_by_row() -> None:
    module = get_modality("audio").build_tokenizer(WIDTH)
    assert module is not None
    values = torch.randn(1, 1, 128, 1024)
    patch = values[0, 0, 30 : 30 + 16, 70 : 70 + 16]  # row 3, column 7 of the 12 x 101 patches
    conv = module.conv
    assert isinstance(conv, torch.nn.Conv2d) and conv.bias is not None
    expected = (conv.weight[:, 0] * patch).sum((1, 2)) + conv.bias
    torch.testing.assert_close(module(values)[0, 3 * 101 + 7], expected, atol=1e-5, rtol=1e-4)


def test_fmri_tokens_interleave_the_outputs() -> None:
    module = get_modality("fmri").build_tokenizer(WIDTH)
    assert module is not None
    values = torch.randn(1, 1, 15724)
    linear = module.linear
    assert isinstance(linear, torch.nn.Linear)
    flat = linear(values[0, 0])
    torch.testing.assert_close(module(values)[0, 3], flat[3::8], atol=1e-5, rtol=1e-4)


def test_point_indices_are_the_references() -> None:
    colours = PARITY["point.input"][None, :, 3:6].contiguous()
    centres = sample_farthest_points(colours, CENTRES)
    assert torch.equal(centres[0], PARITY["point.fps_idx"])
    assert torch.equal(
        find_nearest_neighbours(colours, centres, NEIGHBOURS)[0, :8], PARITY["point.knn_idx_first8"]
    )


def brute_force_farthest(cloud: np.ndarray, count: int) -> list[int]:
    """The definition, with the reference's tie-break, one point at a time."""
    chosen, nearest = [0], np.full(len(cloud), 1e10, np.float32)
    while len(chosen) < count:
        step = (cloud - cloud[chosen[-1]]) ** 2
        nearest = np.minimum(nearest, step[:, 0] + step[:, 1] + step[:, 2])
        best = np.flatnonzero(nearest == nearest.max())
        chosen.append(int(min(best, key=lambda k: (k % 1024, k))))
    return chosen


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([1024, 2048, 8192]))
def test_farthest_points_break_ties_as_the_reference_does(
    seed: int, levels: int, total: int
) -> None:
    cloud = np.random.default_rng(seed).integers(0, levels, (total, 3)).astype(np.float32)
    found = sample_farthest_points(torch.from_numpy(cloud)[None], 40)[0].tolist()
    assert found == brute_force_farthest(cloud, 40)


def test_a_cloud_of_few_colours_repeats_point_zero() -> None:
    colours = torch.zeros(1, 8192, 3)
    colours[0, 5000:] = 1.0
    found = sample_farthest_points(colours, 10)[0].tolist()
    assert found[0] == 0 and colours[0, found[1], 0] == 1.0 and set(found[2:]) == {0}


def test_no_clouds_cost_a_few_calls_and_not_one_for_each_point() -> None:
    """An absent modality runs in every micro-batch: 15,348 calls otherwise."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        found = sample_farthest_points(torch.empty(0, 8192, 3), CENTRES)
    assert found.shape == (0, CENTRES) and found.dtype == torch.int64
    assert len(profiler.events() or ()) < 10


def test_planar_torch_path_agrees_with_numpy() -> None:
    """The code that runs on CUDA, here on the CPU."""
    from onellm_dist.modalities.transforms.cloud_sampling import _farthest_numpy, _farthest_torch

    planar = torch.from_numpy(
        np.random.default_rng(3).integers(0, 40, (2, 3, 2048)).astype(np.float32)
    )
    both = _farthest_torch(planar, 300)
    for i in range(2):
        assert both[i].tolist() == _farthest_numpy(planar[i].numpy(), 300).tolist()


def test_neighbours_by_tree_and_by_distances_agree_with_the_definition() -> None:
    from onellm_dist.modalities.transforms.cloud_sampling import _nearest_torch, _nearest_tree

    generator = torch.Generator().manual_seed(0)
    points, at = (
        torch.rand(9, 500, 3, generator=generator),
        torch.rand(9, 20, 3, generator=generator),
    )
    brute = ((at[:, :, None] - points[:, None]).double() ** 2).sum(-1).argsort(2)[..., :7]
    assert torch.equal(_nearest_tree(points, at, 7), brute)
    assert torch.equal(_nearest_torch(points, at, 7), brute)


def test_point_tokens_are_the_plain_convolution_and_maximum() -> None:
    torch.manual_seed(1)
    module, values = PointTokenizer(WIDTH), torch.rand(2, 8192, 6)
    colours = values[..., 3:].contiguous()
    index = find_nearest_neighbours(colours, sample_farthest_points(colours, CENTRES), NEIGHBOURS)
    groups = torch.stack([values[i][index[i]] for i in range(2)])
    weight, bias = module.conv.weight.flatten(1), module.conv.bias
    assert bias is not None
    plain = (groups @ weight.t() + bias).amax(2)
    got = module(values)
    torch.testing.assert_close(got, plain, atol=1e-5, rtol=1e-5)
    target = torch.randn_like(plain)
    expected = torch.autograd.grad((plain * target).sum(), [module.conv.weight, bias])
    found = torch.autograd.grad((got * target).sum(), [module.conv.weight, bias])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-2, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", TRAINABLE)
def test_cuda_gives_the_cpus_tokens(name: str) -> None:
    modality = get_modality(name)
    module = modality.build_tokenizer(WIDTH)
    assert module is not None
    values = torch.rand(3, *modality.value_shape)
    expected = module(values)
    got = module.cuda()(values.cuda()).cpu()
    close = torch.isclose(got, expected, atol=1e-2, rtol=1e-2)  # cuDNN's convolutions may use TF32
    # A neighbour whose distance ties in fp32 may differ, and with it one token of a cloud.
    assert close.all(2).float().mean() > (0.99 if name == "point" else 0.9999)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_point_indices_on_cuda_are_the_references() -> None:
    colours = PARITY["point.input"][None, :, 3:6].contiguous().cuda()
    centres = sample_farthest_points(colours, CENTRES)
    assert torch.equal(centres[0].cpu(), PARITY["point.fps_idx"])
    assert torch.equal(
        find_nearest_neighbours(colours, centres, NEIGHBOURS)[0, :8].cpu(),
        PARITY["point.knn_idx_first8"],
    )


class CountCalls(TorchDispatchMode):
    """Counts calls of operations: launches, on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += 1
        return func(*args, **kwargs or {})


def test_no_clouds_cost_no_search() -> None:
    """As on a GPU: the meta device takes the same way."""
    tokenizer = PointTokenizer(WIDTH).to("meta")
    with CountCalls() as counted:
        tokens = tokenizer(torch.empty((0, 8192, 6), device="meta"))
    assert tokens.shape == (0, CENTRES, WIDTH)
    assert counted.calls < 40
