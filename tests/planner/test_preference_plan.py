"""Plans of DPO: the copy is memory, and the reference is work."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from plain_counts import write_recipe

from onellm_dist.config.train_sections import DpoSection
from onellm_dist.model.losses.preference import list_llms, prepare_preference
from onellm_dist.planner.command import PlanOptions, make_planner
from onellm_dist.planner.counting import list_units
from onellm_dist.planner.module_labels import HEAD, LLM
from onellm_dist.planner.pack_shapes import measure_sizes
from onellm_dist.planner.run_plan import Planner, build_model, load_model_config
from onellm_dist.train.engine.fsdp.units import find_units
from onellm_dist.train.recipe_summary.parameters import format_parameters

H100 = PlanOptions(gpu="h100", gpus_per_node=2)
PAIRS = ["data.text_format=conversation", "train.loss=dpo", "data.preference_pairs=true"]
COPY = ["train.stage=tune", "train.dpo={reference: copy}"]
ADAPTER = ["train.stage=tune", "train.lora={rank: 2}"]


def plan(folder: Path, *keys: str) -> Planner:
    return make_planner(write_recipe(folder), ["data.text_format=conversation", *keys], H100)


def test_a_copy_is_counted_as_frozen_weights(tmp_path: Path) -> None:
    alone, copied = plan(tmp_path, "train.stage=tune"), plan(tmp_path, *PAIRS, *COPY)
    llm = sum(p.numel() for p in alone.get_model("none").llm.parameters())
    assert copied.parameters.trainable == alone.parameters.trainable == llm
    assert copied.parameters.frozen == alone.parameters.frozen + llm
    adapted = plan(tmp_path, *PAIRS, *ADAPTER)
    assert adapted.parameters.frozen == alone.parameters.frozen + llm


def test_the_copy_stands_in_the_table_of_a_start(tmp_path: Path) -> None:
    config = plan(tmp_path, *PAIRS, *COPY).config
    lines = format_parameters(config, build_model(load_model_config(config)))
    row = next(line for line in lines if line.split()[0] == "reference")
    llm = next(line for line in lines if line.split()[0] == "llm")
    assert row.split()[1:3] == [llm.split()[1], "frozen"]


def test_embedding_and_head_of_the_copy_are_gathered_alone(tmp_path: Path) -> None:
    """Else they would be gathered with the root, and held for the length of every pass."""
    config = plan(tmp_path, *PAIRS, *COPY).config
    model = build_model(load_model_config(config))
    prepare_preference(model, DpoSection(reference="copy"))
    ends = [end for llm in list_llms(model) for end in (llm.get_input_embeddings(), llm.lm_head)]
    assert len({id(end.weight) for end in ends}) == 4
    for units in (find_units(model), list_units(model)):
        assert {id(end) for end in ends} <= {id(unit) for unit in units}
        inside = {id(p) for unit in units for p in unit.parameters()}
        rows = {p.shape[0] for p in model.parameters() if id(p) not in inside}
        assert ends[0].weight.shape[0] not in rows


def count_llm(planner: Planner) -> float:
    """FLOPs of LLM and head in a step."""
    return sum(
        float((group.evaluate(measure_sizes(pack, planner.modalities))[0] * group.repeats).sum())
        for group in planner.get_costs("none").groups
        for pack in planner.get_step(planner.config).packs
        if group.part in (LLM, HEAD)
    )


@pytest.mark.parametrize("keys", [COPY, ADAPTER], ids=["copy", "adapter"])
@pytest.mark.seconds
def test_both_texts_and_the_reference_are_work(tmp_path: Path, keys: list[str]) -> None:
    planner = plan(tmp_path, *PAIRS, *keys)
    single = plan(tmp_path, *(key for key in keys if "dpo" not in key))
    found, one = planner.plan(), single.plan()
    (sample, *_), (other, *_) = planner.data.samples, single.data.samples
    assert (sample.answers, other.answers) == (2, 1)
    assert sample.text_tokens == 2 * other.text_tokens
    assert sample.llm_tokens == 2 * other.llm_tokens
    # A forward pass of the reference on top of each text: 8 for 6 N, and 6 for 4 N with adapters.
    expected = 2 * 6 / 4 if keys is ADAPTER else 2 * 8 / 6
    assert count_llm(planner) / count_llm(single) == pytest.approx(expected, rel=0.08)
    assert found.time.total > one.time.total
    assert found.memory.fits


@pytest.mark.parametrize("tokens", [1, pytest.param(2, marks=pytest.mark.soak), 3])
@pytest.mark.seconds
def test_the_shortest_pairs_are_two_texts(tmp_path: Path, tokens: int) -> None:
    options = dataclasses.replace(H100, text_tokens=tokens)
    keys = ["data.text_format=conversation", *PAIRS, *ADAPTER]
    planner = make_planner(write_recipe(tmp_path), keys, options)
    (sample, *_) = planner.data.samples
    assert sample.text_tokens == max(2, tokens)
    assert sample.supervised_tokens == max(2, tokens) - 2
    planner.plan()
