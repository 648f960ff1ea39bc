"""Formats are found by looking into a folder: a format costs one file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import llama
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from onellm_dist.common.errors import UsageError
from onellm_dist.convert import formats, registry
from onellm_dist.convert.conversion import convert
from onellm_dist.convert.registry import (
    import_format,
    list_formats,
    list_writable,
    recognise_format,
)

NUMBERS = """
from pathlib import Path

from transformers import LlamaConfig

from onellm_dist.convert.checkpoint import OpenedCheckpoint
from onellm_dist.convert.formats.hf import fit_llm
from onellm_dist.convert.tensors.safetensors_files import read_safetensors

NAME = "numbers"
KIND = "llm"
ORDER = 100
ABOUT = "A file of numbers."
EXAMPLE = "model.numbers"
DEFAULT_TARGET = "hf"


def is_format(path):
    return path.suffix == ".numbers"


def open_checkpoint(path, options):
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )
    state = read_safetensors(path)
    return fit_llm(OpenedCheckpoint(NAME, KIND, config, state, (path,), path.parent))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of formats beside the package's own."""
    own = registry._FOLDER
    added = tmp_path / "formats"
    added.mkdir()
    for path in own.glob("*.py"):
        (added / path.name).symlink_to(path)
    (added / "numbers_file.py").write_text(NUMBERS)
    monkeypatch.setattr(registry, "_FOLDER", added)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(added)])
    list_formats.cache_clear()
    yield tmp_path
    list_formats.cache_clear()
    sys.modules.pop("onellm_dist.convert.formats.numbers_file", None)


def test_a_format_costs_one_file(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "hf")
    source = folder / "model.numbers"
    (folder / "hf" / "model.safetensors").rename(source)
    assert recognise_format(source) == "numbers"
    assert "numbers" not in list_writable()
    opened, _ = convert("numbers", source, folder / "out", quiet=True)
    assert not opened.problems
    written = load_file(folder / "out" / "model.safetensors")
    assert all(torch.equal(written[name], t) for name, t in model.state_dict().items())
    llama().save_pretrained(folder / "other")
    assert recognise_format(folder / "other") == "hf", "the own formats are still there"


def test_every_format_is_complete() -> None:
    found = list_formats()
    assert list(found)[:4] == ["onellm", "reference", "meta-llama", "hf"]
    assert len({info.order for info in found.values()}) == len(found)
    for name, info in found.items():
        module = import_format(name)
        assert info.default_target in list_writable()
        assert callable(module.is_format)
        assert callable(module.open_checkpoint)
        assert info.is_writable == hasattr(module, "plan_output")
    with pytest.raises(UsageError, match="unknown format 'pdf'"):
        import_format("pdf")


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; from onellm_dist.cli import convert; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
