"""`generate`: the cache, left padding, and spans that are inserted once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from packs import WORDS, small_model
from transformers import GenerationConfig

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.model import OneLLMForConditionalGeneration

# transformers renames arguments, and warns where an old name is used.
pytestmark = pytest.mark.filterwarnings("error::FutureWarning")
NEW = 7
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def model() -> OneLLMForConditionalGeneration:
    """Large weights, so that what a text says next depends on all that came before."""
    model = small_model()
    model.train(mode=False)
    with torch.no_grad():
        for name, p in model.llm.named_parameters():
            if "proj" in name:
                p.mul_(2.5)
    return model


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, WORDS, (3, 6), generator=generator)
    mask = torch.tensor([[1] * 6, [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    ids = torch.where(mask.cumsum(1) == 1, 1, ids).where(mask == 1, torch.tensor(0))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "image_values": torch.randn(3, 3, 224, 224, generator=generator),
        "imu_values": torch.randn(3, 6, 400, generator=generator),
    }


def uncached(
    model: OneLLMForConditionalGeneration, batch: dict[str, Any], **options: Any
) -> torch.Tensor:
    """Greedy decoding by running everything again for each token."""
    batch = dict(batch)
    for _ in range(NEW):
        word = model(**batch, **options).logits[:, -1].argmax(-1, keepdim=True)
        batch["input_ids"] = torch.cat([batch["input_ids"], word], 1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(word)], 1)
    ids: torch.Tensor = batch["input_ids"]
    return ids


@pytest.mark.parametrize(
    "given", [(), ("image",), ("image", "imu")], ids=lambda g: "+".join(g) or "text"
)
@torch.no_grad()
def test_the_cache_changes_nothing(
    model: OneLLMForConditionalGeneration, batch: dict[str, Any], given: tuple[str, ...]
) -> None:
    kept = {
        k: v
        for k, v in batch.items()
        if not k.endswith("_values") or k.removesuffix("_values") in given
    }
    out = model.generate(**kept, **GREEDY)
    assert torch.equal(out, uncached(model, kept))
    assert len({tuple(row[-NEW:].tolist()) for row in out}) > 1, (
        "rows that all say the same test nothing"
    )


@torch.no_grad()
def test_left_padding_changes_nothing(
    model: OneLLMForConditionalGeneration, batch: dict[str, Any]
) -> None:
    together = model.generate(**batch, **GREEDY)
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        values = {k: v[row : row + 1] for k, v in batch.items() if k.endswith("_values")}
        alone = model.generate(batch["input_ids"][row, real][None], **values, **GREEDY)
        assert alone[0, -NEW:].tolist() == together[row, -NEW:].tolist()


@torch.no_grad()
def test_right_padding_changes_no_logits(
    model: OneLLMForConditionalGeneration, batch: dict[str, Any]
) -> None:
    ids = torch.tensor([[1, 5, 9, 4, 0, 0]])
    image = {"image_values": batch["image_values"][:1]}
    padded = model(ids, (torch.arange(6) < 4).long()[None], **image).logits[:, : 32 + 4]
    assert torch.allclose(padded, model(ids[:, :4], **image).logits, atol=1e-5)


@torch.no_grad()
def test_spans_are_inserted_at_prefill_alone(
    model: OneLLMForConditionalGeneration, batch: dict[str, Any]
) -> None:
    lengths: list[int] = []
    handle = model.llm.model.layers[0].register_forward_pre_hook(
        lambda _, args: lengths.append(args[0].shape[1])
    )
    try:
        model.generate(**batch, **GREEDY)
    finally:
        handle.remove()
    assert lengths == [6 + 2 * 32] + [1] * (NEW - 1)


@torch.no_grad()
def test_the_order_of_spans_can_be_chosen(
    model: OneLLMForConditionalGeneration, batch: dict[str, Any]
) -> None:
    swapped = model(**batch, modality_order=["imu", "image"]).logits
    assert torch.equal(
        model(**batch, modality_order=["image", "imu"]).logits, model(**batch).logits
    )
    assert not torch.allclose(swapped, model(**batch).logits)
    out = model.generate(**batch, modality_order=["imu", "image"], **GREEDY)
    assert torch.equal(out, uncached(model, batch, modality_order=["imu", "image"]))


@torch.no_grad()
def test_reference_offset_ends_rows_where_they_end(
    model: OneLLMForConditionalGeneration, batch: dict[str, Any]
) -> None:
    free = model.generate(**batch, decode_offset="reference", **GREEDY)
    first = int(free[0, 6])
    ended = model.generate(
        **batch, decode_offset="reference", **{**GREEDY, "eos_token_id": first, "pad_token_id": 0}
    )
    assert ended[0, 6:].tolist() == [first] + [0] * (ended.shape[1] - 7)
    assert ended[1, 6].item() == free[1, 6].item()


@torch.no_grad()
def test_several_sequences_of_a_prompt(
    model: OneLLMForConditionalGeneration, batch: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    out = model.generate(
        **batch, max_new_tokens=3, do_sample=True, num_return_sequences=2, eos_token_id=None
    )
    assert out.shape == (6, 9)
    assert torch.equal(out[:, :6], batch["input_ids"].repeat_interleave(2, 0))
    with pytest.raises(UsageError, match="several sequences"):
        model.generate(
            **batch,
            max_new_tokens=3,
            do_sample=True,
            num_return_sequences=2,
            decode_offset="reference",
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decode_offset": "30"}, "decode_offset='30'"),
        ({"smell_values": torch.zeros(3, 1)}, "unknown input smell_values"),
        ({"fmri_values": torch.zeros(1, 1, 15724)}, "1 row for 3 texts"),
        ({"modality_order": ["image"]}, "modality_order"),
    ],
)
def test_wrong_use_is_refused(
    model: OneLLMForConditionalGeneration,
    batch: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        model.generate(**batch, **options, **GREEDY)


def test_a_generation_config_is_held_to_the_same(
    model: OneLLMForConditionalGeneration, batch: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="guidance_scale is set"):
        model.generate(**batch, generation_config=GenerationConfig(guidance_scale=2.0))


def test_lengths_count_text_alone(
    model: OneLLMForConditionalGeneration, batch: dict[str, Any]
) -> None:
    """Media spans are 64 positions here, and no part of what `max_length` counts."""
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    prompt = batch["input_ids"].shape[1]
    expected = model.generate(**batch, **options, max_new_tokens=NEW)
    assert torch.equal(model.generate(**batch, **options, max_length=prompt + NEW), expected)
    both = model.generate(**batch, **options, max_length=3, max_new_tokens=NEW)
    assert torch.equal(both, expected)
    with pytest.raises(UsageError, match=f"max_length={prompt}, and the prompt has {prompt}"):
        model.generate(**batch, **options, max_length=prompt)
    ends: dict[str, Any] = {"eos_token_id": list(range(3, WORDS)), "do_sample": False}
    least = model.generate(**batch, **ends, max_new_tokens=NEW, min_length=prompt + 4)
    assert least.shape[1] >= prompt + 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("assistant_model", object()),
        ("assistant_early_exit", 2),
        ("use_mtp", True),
        ("prompt_lookup_num_tokens", 3),
        ("guidance_scale", 1.5),
        ("num_beam_groups", 2),
        ("diversity_penalty", 0.5),
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("constraints", [object()]),
        ("force_words_ids", [[5]]),
        ("negative_prompt_ids", torch.zeros(1, 2, dtype=torch.int64)),
        ("inputs_embeds", torch.zeros(1, 2, 48)),
        ("position_ids", torch.zeros(1, 2, dtype=torch.int64)),
    ],
)
def test_what_media_do_not_allow_is_refused_by_name(
    model: OneLLMForConditionalGeneration, batch: dict[str, Any], name: str, value: Any
) -> None:
    options: dict[str, Any] = {name: value}
    with pytest.raises(UsageError, match=f"{name} is set"):
        model.generate(**batch, **options, **GREEDY)


@pytest.mark.parametrize("name", ["quantized", "offloaded", "offloaded_static", "paged"])
def test_caches_that_cannot_be_used_are_refused_by_name(
    model: OneLLMForConditionalGeneration, batch: dict[str, Any], name: str
) -> None:
    with pytest.raises(UsageError, match=f"cache_implementation='{name}'"):
        model.generate(**batch, cache_implementation=name, **GREEDY)


def test_options_that_ask_for_nothing_and_other_caches_change_nothing(
    model: OneLLMForConditionalGeneration, batch: dict[str, Any]
) -> None:
    plain = model.generate(**batch, **GREEDY)
    neutral: dict[str, Any] = {
        "guidance_scale": 1,
        "num_beam_groups": 1,
        "diversity_penalty": 0.0,
        "penalty_alpha": 0.0,
    }
    assert torch.equal(model.generate(**batch, **neutral, **GREEDY), plain)
    for name in ("static", "dynamic"):
        cached = model.generate(**batch, cache_implementation=name, **GREEDY)
        assert torch.equal(cached, plain)
    assert torch.equal(model.generate(**batch, use_cache=False, **GREEDY), plain)


def test_an_output_with_names_has_prompts_and_answers(
    model: OneLLMForConditionalGeneration, batch: dict[str, Any]
) -> None:
    plain = model.generate(**batch, **GREEDY)
    options: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
    output = model.generate(**batch, **GREEDY, **options)
    assert torch.equal(output.sequences, plain)
    prompt = batch["input_ids"].shape[1]
    assert torch.equal(output.logits[0].argmax(-1), plain[:, prompt])
    beams = model.generate(**batch, **GREEDY, **options, num_beams=2, num_return_sequences=2)
    assert torch.equal(beams.sequences[::2, :prompt], batch["input_ids"])
    with pytest.raises(UsageError, match="return_dict_in_generate is set"):
        model.generate(**batch, **GREEDY, **options, decode_offset="reference")


@pytest.mark.parametrize("how", [{}, {"do_sample": True}, {"num_beams": 2}], ids=str)
def test_logits_that_are_no_numbers_are_refused(
    model: OneLLMForConditionalGeneration,
    batch: dict[str, Any],
    how: dict[str, Any],
) -> None:
    head = model.llm.lm_head.weight
    before = head.detach().clone()
    with torch.no_grad():
        head[-1] = torch.nan
    try:
        with pytest.raises(OneLLMError, match="not numbers"):
            model.generate(**batch, **{**GREEDY, **how})
    finally:
        head.data.copy_(before)


def test_another_number_of_embeddings_is_refused_and_changes_nothing() -> None:
    model = small_model()
    before = model.get_input_embeddings()
    with pytest.raises(UsageError, match="resize_token_embeddings"):
        model.resize_token_embeddings(WORDS + 3)
    assert model.resize_token_embeddings() is before is model.get_input_embeddings()
