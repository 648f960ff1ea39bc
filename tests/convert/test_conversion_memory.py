"""Conversions hold blocks, not models: the peak memory of a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

CONVERT = """
import resource, sys
from pathlib import Path
from onellm_dist.convert.formats import hf, meta_llama
from onellm_dist.convert.conversion import convert

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

convert("hf", Path(sys.argv[1]), Path(sys.argv[2]) / "warm", to="hf", quiet=True)
before = peak()
convert("hf", Path(sys.argv[3]), Path(sys.argv[2]) / "big", to=sys.argv[4], quiet=True)
print(before, peak())
"""


def save_llama(folder: Path, vocabulary: int) -> int:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) >> 20


@pytest.mark.slow
@pytest.mark.parametrize("to", ["hf", "meta-llama"])
def test_peak_memory_does_not_follow_the_size(to: str, tmp_path: Path) -> None:
    """400 MB in two tensors of 200 MB: less than a quarter of one is held."""
    save_llama(tmp_path / "small", 100)
    size = save_llama(tmp_path / "large", 200_000)
    command = [
        sys.executable,
        "-c",
        CONVERT,
        *map(str, (tmp_path / "small", tmp_path, tmp_path / "large", to)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    before, after = map(int, done.stdout.split()[-2:])
    assert size > 390
    assert after - before < 50
    assert sum(f.stat().st_size for f in (tmp_path / "big").iterdir()) >> 20 >= size
