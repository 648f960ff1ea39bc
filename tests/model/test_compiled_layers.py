"""Blocks of many layers that are compiled: none runs uncompiled, in training or validation.

They are traced as for inductor, but run by torch, which takes a minute in place of many.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from packs import small_model
from test_compiled_blocks import NAMES, WARMED_UP, check_loss, check_step, draw_packs

from onellm_dist.config.train_sections import LoraSection
from onellm_dist.model.adapters.lora import add_adapters
from onellm_dist.model.compiled_blocks import compile_blocks
from onellm_dist.model.model_kernels import set_kernels
from onellm_dist.model.recompute import enable_activation_checkpointing

pytestmark = pytest.mark.soak
LAYERS = 10
"""Of an LLM: more than torch's own limit of graphs for a piece of code."""
MOST_OF_LAYERS = 80
"""Graphs in all; 68 and 70 were seen."""
LORA = LoraSection(rank=2, targets=("llm.*q_proj", "upm.*"))


def make_model(kernels: str, adapted: bool) -> Any:
    model: Any = small_model(modalities=NAMES, llm_layers=LAYERS)
    if adapted:
        torch.manual_seed(0)
        add_adapters(model, LORA)
    set_kernels(model, kernels, "cpu")
    return model


@pytest.mark.parametrize(
    ("kernels", "adapted", "recompute"),
    [("plain", False, "none"), ("fused", True, "none"), ("plain", False, "full")],
)
def test_all_layers_share_graphs_in_training_and_validation(
    monkeypatch: pytest.MonkeyPatch, kernels: str, adapted: bool, recompute: str
) -> None:
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    plain, compiled = (make_model(kernels, adapted) for _ in range(2))
    torch._dynamo.reset()
    found = compile_blocks(compiled, "cpu")
    assert found == {"EncoderBlock": 2, "UPMBlock": 6, "LlamaDecoderLayer": LAYERS}
    for model in (plain, compiled):
        enable_activation_checkpointing(model, recompute)
    counters.clear()
    graphs = []
    with config.patch(fail_on_recompile_limit_hit=True):
        for pack in draw_packs()[: WARMED_UP + 4]:
            check_step(compiled.train(), plain.train(), pack)
            with torch.no_grad():
                check_loss(compiled.eval()(packed=pack).loss, plain.eval()(packed=pack).loss)
            graphs.append(counters["stats"]["unique_graphs"])

    print(f"{kernels}, adapters {adapted}, recomputation {recompute}: {graphs[-1]} graphs")
    assert 0 < graphs[-1] <= MOST_OF_LAYERS
    assert graphs[-1] == graphs[WARMED_UP], "a later pack was compiled again"
