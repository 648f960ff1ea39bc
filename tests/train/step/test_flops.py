"""Model FLOPs of a step, against torch's own counter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from stage_setup import freeze_for_stage
from torch.utils.flop_counter import FlopCounterMode
from toy_packs import make_toy_pack

from onellm_dist.data.micro_batch import BatchTotals
from onellm_dist.modalities import SPAN_TOKENS, all_modalities
from onellm_dist.model.presets import load_model
from onellm_dist.train.step.flops import FlopCounter

TEXT = 60


@pytest.fixture(scope="module")
def toy() -> Any:
    model, _ = load_model(path=None, preset="toy", seed=0)
    return model


@pytest.mark.parametrize("stage", ["align", "tune"])
@pytest.mark.parametrize("name", ["image", "imu"])
@pytest.mark.seconds
def test_the_formula_counts_what_is_computed(toy: Any, stage: str, name: str) -> None:
    """Against torch's count of matrix products in forward and backward, less what is left out."""
    samples = 2
    batch = make_toy_pack([name] * samples, TEXT)
    freeze_for_stage(toy, stage, {name})
    modality = all_modalities()[name]
    media = SimpleNamespace(varied=[False])
    corpus: Any = SimpleNamespace(spans=[(name,)], modalities={name: modality}, media=media)
    counter = FlopCounter(toy, corpus)
    totals = BatchTotals(
        samples=samples,
        llm_tokens=samples * (TEXT + SPAN_TOKENS),
        encoder_tokens=samples * modality.encoder_tokens,
        supervised_tokens=samples * (TEXT - 1),
        empty_micro_batches=0,
        samples_by_dataset=(samples,),
        samples_by_combination={(name,): samples},
    )
    plan: Any = SimpleNamespace(totals=totals, global_valid_tokens=1, balance=1.0)
    computed = counter.count(plan).flops
    with FlopCounterMode(display=False, depth=3) as counted:
        toy(packed=batch).loss.backward()
    toy.zero_grad()
    counts = counted.get_flop_counts()["Global"]
    attention = sum(n for op, n in counts.items() if "attention" in str(op))
    left_out = count_left_out(toy, name, samples, trains=stage == "align")
    assert computed == pytest.approx(sum(counts.values()) - attention - left_out, rel=0.001)


def count_left_out(model: Any, name: str, samples: int, *, trains: bool) -> float:
    """What the formula leaves out: projections and tokenizers of the modality, and all routers."""
    width = model.config.vision.width
    llm = model.config.text_config.hidden_size
    hidden = model.config.upm.router_hidden
    modality = all_modalities()[name]
    queries = modality.upm_tokens - modality.tokens - 1
    inputs = samples * (modality.tokens + 1) * 2 * width * width
    outputs = samples * queries * 2 * width * llm
    routers = queries * 2 * hidden * (width + model.config.upm.experts)
    # Image's input projection needs no gradient of its input (the encoder before it is frozen);
    # IMU's passes it on to the tokenizer.
    backward = (1 if modality.visual else 2, 2, 2) if trains else (0, 0, 0)
    total = (
        inputs * (1 + backward[0])
        + outputs * (1 + backward[1])
        + routers * (len(model.config.modalities) + backward[2])
    )
    if modality.visual:
        inputs_per_token = 3 * model.config.vision.patch_size**2
    else:
        inputs_per_token = 6 * 10 * (2 if trains else 1)
    return float(total + samples * modality.tokens * 2 * width * inputs_per_token)
