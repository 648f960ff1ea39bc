"""Several adapters over one base: each gives what its merged model gives, in any order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_folders import SECTION, save_adapter, save_base
from toy_packs import make_toy_pack

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.config.train_sections import LoraSection
from onellm_dist.convert.conversion import convert
from onellm_dist.model.adapters.adapter_set import (
    AdapterSet,
    NamedAdapter,
    check_adapters,
    parse_adapters,
)
from onellm_dist.model.adapters.folder import BASE, WEIGHTS
from onellm_dist.model.presets import load_model
from onellm_dist.model.spans.trained import get_spans

pytestmark = pytest.mark.slow
SECTIONS = {
    "photos": SECTION,
    "v1.2": LoraSection(
        rank=2, alpha=4, dora=True, rslora=True, targets=("llm.*q_proj", "llm.*mlp*")
    ),
    "towers": LoraSection(rank=3, alpha=3, targets=("encoder.*", "upm.*")),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and beside it an adapter of each section."""
    folder = save_base(tmp_path_factory.mktemp("adapters") / "base")
    for seed, (name, section) in enumerate(SECTIONS.items()):
        save_adapter(folder.parent / name, folder, seed=seed, section=section, scale=0.1)
    return folder


def open_model(folder: Path) -> Any:
    model: Any
    model, _ = load_model(path=folder, preset=None, seed=0)
    return model.eval()


def list_adapters(base: Path) -> list[NamedAdapter]:
    return parse_adapters(f"{name}={base.parent / name}" for name in SECTIONS)


def test_each_adapter_gives_what_its_merged_model_gives(base: Path) -> None:
    batch = make_toy_pack(["image", "imu"], 20)
    expected = {
        name: open_model(base.parent / (name or "base")).compute_packed_logits(batch)[0].detach()
        for name in ("", *SECTIONS)
    }
    model, adapters = open_model(base), list_adapters(base)
    check_adapters(base, adapters)
    loaded = AdapterSet(model, adapters)
    for name in ("", "photos", "v1.2", "photos", "towers", "", "", "v1.2"):
        loaded.select(name)
        with torch.inference_mode():
            found = model.compute_packed_logits(batch)[0]
        for other, logits in expected.items():
            gap = float((found - logits).abs().max() / logits.abs().max())
            assert gap < 1e-5 if other == name else gap > 1e-3, (name, other, gap)
    with pytest.raises(KeyError):
        loaded.select("photo")


@pytest.mark.parametrize(
    ("items", "word"),
    [
        (["photos"], "is not NAME=DIR"),
        (["photos="], "is not NAME=DIR"),
        (["../a=photos"], "is not NAME=DIR"),
        (["a=photos", "a=towers"], "a is given twice"),
        (["a=base"], "no adapter in this folder"),
        (["a=nowhere"], "no adapter in this folder"),
    ],
)
def test_what_names_no_adapter_is_refused(base: Path, items: list[str], word: str) -> None:
    places = [item.replace("=", f"={base.parent}/") if item[-1] != "=" else item for item in items]
    with pytest.raises(UsageError, match=word):
        parse_adapters(places)


def test_adapters_of_another_base_are_refused(base: Path, tmp_path: Path) -> None:
    adapters = list_adapters(base)
    with pytest.raises(UsageError, match="holds an adapter"):
        check_adapters(adapters[0].folder, adapters)
    own = NamedAdapter("own", tmp_path / "own")
    save_adapter(own.folder, base, seed=1)
    (own.folder / BASE).write_text(json.dumps({"preset": "toy", "seed": 0}))
    with pytest.raises(UsageError, match="trained over the preset toy"):
        check_adapters(base, [own])
    files = {"model.safetensors": [1, 1, "0" * 64]}
    (own.folder / BASE).write_text(json.dumps({"path": "/gone", "files": files}))
    with pytest.raises(UsageError, match="is not the file that the adapter was trained over"):
        check_adapters(base, [own])
    (own.folder / BASE).write_text(json.dumps({"path": "/gone"}))
    check_adapters(base, [own])
    # The weights of one adapter under the configuration of another.
    (own.folder / WEIGHTS).write_bytes((base.parent / "towers" / WEIGHTS).read_bytes())
    with pytest.raises(OneLLMError, match="does not fit"):
        AdapterSet(open_model(base), [adapters[0], own])
    (own.folder / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(UsageError, match="cannot be read"):
        AdapterSet(open_model(base), [own])


@pytest.mark.parametrize(("before", "after"), [({}, {"image": 5}), ({"image": 3}, {})])
def test_an_adapter_reads_media_as_it_was_trained(
    before: dict[str, int], after: dict[str, int], tmp_path: Path
) -> None:
    """Alone and merged with the spans of its own run; beside a base with others it is refused."""
    base, folder = save_base(tmp_path / "base", before), tmp_path / "adapter"
    save_adapter(folder, base, seed=1, spans=after)
    convert("adapter", folder, tmp_path / "merged", quiet=True)
    for path, spans in ((base, before), (folder, after), (tmp_path / "merged", after)):
        model, processor = load_model(path=path, preset=None, seed=0)
        assert (get_spans(model.config), processor.spans) == (spans, spans), path
    with pytest.raises(UsageError, match=r"with the spans (.|\n)*in place of the model") as caught:
        check_adapters(base, [NamedAdapter("own", folder)])
    assert "image" in caught.value.what and "one a medium" in caught.value.what
    save_adapter(tmp_path / "same", base, seed=1)
    check_adapters(base, [NamedAdapter("own", tmp_path / "same")])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "spans": {"image": 0}}))
    with pytest.raises(UsageError, match=r"config\.json: spans: \{'image': 0\}"):
        check_adapters(base, [NamedAdapter("own", folder)])
