"""Which modalities are found: files of the package, entry points of others, and what is refused."""

from __future__ import annotations

import io
import os
import subprocess
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from added_file import added_file
from forked_python import get_programs

from onellm_dist import modalities
from onellm_dist.common import plugins
from onellm_dist.common.errors import UsageError
from onellm_dist.modalities import Part, all_modalities, get_modality, registry

THERMAL = '''
"""Thermal pictures, [64, 64] degrees Celsius."""

import numpy as np
import torch
from PIL import Image

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import Modality
from onellm_dist.modalities.io.arrays import read_npy


class ThermalTokenizer(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, width, kernel_size=16, stride=16)

    def forward(self, values):
        return self.conv(values.to(self.conv.weight.dtype)).flatten(2).transpose(1, 2)


class Thermal(Modality):
    name = "thermal"
    order = 8
    required_parts = {"thermal": ("thermal.npy", "npy")}
    value_shape = (1, 64, 64)
    tokens = 16

    def decode(self, parts, meta):
        array = read_npy(parts["thermal"])
        if array.shape != (64, 64):
            raise SampleError(f"shape {array.shape}", "not [64, 64]", "drop it")
        return array.astype(np.float32)

    def transform(self, raw, *, train, rng):
        return torch.from_numpy((raw - 20) / 10)[None]

    def build_tokenizer(self, width):
        return ThermalTokenizer(width)

    def preview(self, raw):
        return Image.fromarray(raw.clip(0, 255).astype(np.uint8)).convert("RGB")


MODALITY = Thermal()
'''

USE = """
import torch
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.model import build_config, load_model

assert list(all_modalities())[-2:] == ["fmri", "thermal"]
assert build_config("toy").modalities[-1] == "thermal"
model, processor = load_model(path=None, preset="toy", seed=0)
ids = torch.tensor([[1, 5, 6, 7]])
values = torch.rand(1, 1, 64, 64)
with torch.no_grad():
    out = model(ids, thermal_values=values)
    other = model(ids, thermal_values=values + 1)
assert out.logits.shape[1] == 4 + 32 and torch.isfinite(out.logits).all()
assert not torch.equal(out.logits, other.logits)
print("used", get_modality("thermal").encoder_tokens)
"""


def install(folder: Path, name: str, points: str) -> None:
    """What an installed package leaves: its metadata with entry points."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


def run(folder: Path, *command: str) -> str:
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [str(get_programs() / "python"), *command],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_file_in_the_folder_is_a_modality(tmp_path: Path) -> None:
    known = list(all_modalities())
    stored = io.BytesIO()
    np.save(stored, np.full((64, 64), 30.0))
    parts = {"thermal": Part("thermal.npy", stored.getvalue())}
    with added_file(modalities, "thermal", THERMAL, tmp_path, all_modalities.cache_clear):
        assert list(all_modalities()) == [*known, "thermal"]
        thermal = get_modality("thermal")
        value = thermal.read_value(parts, {}, train=False, rng=np.random.default_rng(0))
        assert torch.equal(value, torch.ones(1, 64, 64))
        tokenizer = thermal.build_tokenizer(8)
        assert tokenizer is not None
        assert tokenizer(value[None]).shape == (1, thermal.tokens, 8)
    assert list(all_modalities()) == known


@pytest.mark.slow
def test_another_package_adds_a_modality_by_an_entry_point(tmp_path: Path) -> None:
    package = tmp_path / "site"
    install(package, "thermal", "[onellm_dist.modalities]\nthermal = thermal_package\n")
    (package / "thermal_package.py").write_text(THERMAL)
    inputs = tmp_path / "in"
    inputs.mkdir()
    for i in range(3):
        shape = (64, 64) if i < 2 else (8, 8)
        np.save(inputs / f"{i}.npy", np.full(shape, 20.0 + i))
        (inputs / f"{i}.txt").write_text("a warm hand")
    built = run(
        package,
        *("-m", "onellm_dist.cli", "shards", "build", "folder", str(inputs), str(tmp_path / "out")),
        *("-o", "modality=thermal", "-o", "max_failures=0.5"),
    )
    assert "2 samples" in built and "unreadable thermal: shape (8, 8)" in built
    assert run(package, "-c", USE) == "used 17\n"


def test_an_unknown_modality_is_refused_with_both_places_to_look() -> None:
    with pytest.raises(UsageError, match=r"(?s)'smell'.*onellm_dist\.modalities.*image, video"):
        get_modality("smell")


def entry_points_of(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    made = [EntryPoint(name, value, plugins.MODALITIES) for name, value in points]
    monkeypatch.setattr(plugins, "entry_points", lambda group: made)


def find_all() -> dict[str, object]:
    return dict(registry.all_modalities.__wrapped__())


def test_a_second_modality_of_one_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points_of(monkeypatch, ("mine", "onellm_dist.modalities.audio"))
    with pytest.raises(UsageError) as error:
        find_all()
    assert error.value.what == (
        "two modalities have the name 'audio': onellm_dist.modalities.audio and entry point mine "
        "of group onellm_dist.modalities"
    )


def test_a_second_modality_of_one_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = type("Other", (type(get_modality("audio")),), {"name": "other"})()
    monkeypatch.setattr(registry, "load_plugins", lambda group: {"other": other})
    with pytest.raises(UsageError, match=r"two modalities have the order 2: .*audio and entry"):
        find_all()


def test_two_entry_points_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points_of(monkeypatch, ("mine", "json"), ("mine", "string"))
    with pytest.raises(UsageError, match="two packages have an entry point mine"):
        find_all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("json", "entry point mine of group onellm_dist.modalities is a module, not a modality"),
        ("no_such_module", "cannot be loaded: ModuleNotFoundError"),
        ("onellm_dist.modalities.audio:AudioModality", "is a ABCMeta, not a modality"),
    ],
)
def test_what_is_not_a_modality_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str, message: str
) -> None:
    entry_points_of(monkeypatch, ("mine", value))
    with pytest.raises(UsageError, match=message):
        find_all()
