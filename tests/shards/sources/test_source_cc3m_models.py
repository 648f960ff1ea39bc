"""Sources cc3m-depth and cc3m-normal with `depth_model`: maps that the builder makes itself."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cc3m_worlds import img2dataset_tar, parallel
from PIL import Image
from shard_worlds import all_bytes
from source_checks import build_source, decode_sample, make_photo, read_samples

from onellm_dist.common.checksums import write_sums
from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.readers.depth_models import estimate_normals


@pytest.fixture(scope="module")
def dpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DPT of the real classes with random weights, saved as its makers save theirs."""
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessor

    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=64,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 24, 32, 32],
        fusion_hidden_size=32,
        reassemble_factors=[4, 2, 1, 0.5],
        is_hybrid=False,
        use_auxiliary_head=False,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny-dpt"
    model = DPTForDepthEstimation(config)
    with torch.no_grad():
        # The last ReLU must not be dead.
        model.get_parameter("head.head.4.bias").fill_(10.0)
    model.save_pretrained(folder)
    DPTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_maps_made_here(tmp_path: Path, dpt: Path) -> None:
    """From tars; equal bytes with one process and with three; equal to transformers' pipeline."""
    from transformers import pipeline

    (tmp_path / "in").mkdir()
    for name in ("00000", "00001"):
        img2dataset_tar(tmp_path / "in", name)
    options: dict[str, Any] = {"depth_model": str(dpt), "max_samples": 3, "name": "x"}
    report, dataset = build_source("cc3m-depth", tmp_path / "in", tmp_path / "one", **options)
    build_source("cc3m-depth", tmp_path / "in", tmp_path / "three", workers=3, **options)
    assert all_bytes(tmp_path / "one") == all_bytes(tmp_path / "three")
    assert not report.quarantined
    assert dataset.manifest.attributes["depth_model"] == "tiny-dpt"
    assert len(dataset.manifest.attributes["depth_model_sha256"]) == 64
    found = read_samples(dataset)
    assert list(found) == [f"{t}{i:04d}" for t in ("00000", "00001") for i in range(4)]
    sample = found["000000002"]
    assert (sample["jpg"], sample["txt"], sample["json"]["url"]) == (
        make_photo(seed=2),
        "caption 2",
        "http://x/2",
    )
    ours = np.asarray(Image.open(io.BytesIO(sample["depth.png"]))).astype(int)
    theirs = pipeline("depth-estimation", model=str(dpt), device="cpu")(
        Image.open(io.BytesIO(sample["jpg"]))
    )["predicted_depth"]
    values = theirs.squeeze().double().numpy()
    expected = (values - values.min()) / (values.max() - values.min()) * 255
    assert ours.shape == (48, 64)
    assert np.abs(ours - expected).max() < 1.5
    assert (ours.min(), ours.max()) == (0, 255)
    assert decode_sample(dataset, "000000002")["depth"].isfinite().all()

    _, normal = build_source("cc3m-normal", tmp_path / "in", tmp_path / "normal", **options)
    vectors = (
        np.asarray(Image.open(io.BytesIO(read_samples(normal)["000000002"]["normal.png"]))) / 127.5
        - 1
    )
    assert np.abs(np.linalg.norm(vectors, axis=-1) - 1).max() < 0.02
    assert np.abs(vectors - estimate_normals(expected / 255, 0.5)).max() < 0.05
    # Distances: near and far change places.
    _, far = build_source(
        "cc3m-depth", tmp_path / "in", tmp_path / "far", **options, depth_is_distance=True, limit=3
    )
    turned = np.asarray(Image.open(io.BytesIO(read_samples(far)["000000002"]["depth.png"]))).astype(
        int
    )
    assert turned[np.unravel_index(ours.argmax(), ours.shape)] == 0
    assert turned[np.unravel_index(ours.argmin(), ours.shape)] == 255


@pytest.mark.slow
def test_a_model_that_is_none_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    from transformers import ViTConfig

    inputs = parallel(tmp_path / "in", "depth")
    with pytest.raises(UsageError, match=r"there is no transformers model"):
        build_source("cc3m-depth", inputs, tmp_path / "out", depth_model=str(tmp_path))
    ViTConfig().save_pretrained(tmp_path / "vit")
    (tmp_path / "vit/model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"a vit model does not estimate depth"):
        build_source("cc3m-depth", inputs, tmp_path / "out", depth_model=str(tmp_path / "vit"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])
def test_a_damaged_model_is_refused_before_anything_is_built(
    name: str, tmp_path: Path, dpt: Path
) -> None:
    model = shutil.copytree(dpt, tmp_path / "dpt")
    write_sums(model, names=["preprocessor_config.json"])
    data = bytearray((model / name).read_bytes())
    data[len(data) // 2] ^= 1
    (model / name).write_bytes(data)
    inputs = parallel(tmp_path / "in", "depth")
    with pytest.raises(UsageError, match=rf"dpt/{name}"):
        build_source("cc3m-depth", inputs, tmp_path / "out", depth_model=str(model))
    assert not (tmp_path / "out").exists()


def test_the_formula_of_normals() -> None:
    """A wall, a ramp that rises to the right, and a floor."""
    y, x = np.mgrid[:40, :60]
    inside = (slice(2, -2), slice(2, -2))
    assert np.allclose(estimate_normals(np.full((40, 60), 0.3), 0.5)[inside], (0, 0, 1))
    ramp = estimate_normals(x / 60, 0.75)[inside]  # height 0.75 * 40 * x / 60 = x / 2
    assert np.allclose(ramp, np.array([-0.5, 0, 1]) / np.sqrt(1.25))
    floor = estimate_normals(y / 40, 0.5)[inside]
    assert np.allclose(floor, np.array([0, 0.5, 1]) / np.sqrt(1.25))
