"""Trainers of transformers and trl, adapters of peft, and pipelines: as with any other model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packs import small_model
from PIL import Image
from transformers import Trainer, TrainingArguments, pipeline

from onellm_dist.common.errors import UsageError
from onellm_dist.model import OneLLMProcessor
from onellm_dist.model.presets import load_toy_tokenizer
from onellm_dist.packed import IGNORE, PackedBatch

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_processor() -> OneLLMProcessor:
    tokenizer = load_toy_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return OneLLMProcessor(tokenizer)


def make_model(processor: OneLLMProcessor) -> Any:
    words = len(processor.tokenizer)
    return small_model(seed=3, words=words, modalities=["image", "audio", "imu"])


def make_picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def compute_packed_loss(model: Any, inputs: Any, labels: torch.Tensor) -> float:
    """The mean loss of the same samples as one pack."""
    kept = [mask.bool() for mask in inputs["attention_mask"]]
    ids = [row[mask] for row, mask in zip(inputs["input_ids"], kept, strict=True)]
    wanted = [row[mask] for row, mask in zip(labels, kept, strict=True)]
    for row in wanted:
        row[0] = IGNORE
    values = {n: torch.zeros(0, *v) for n, v in (("audio", (1, 128, 1024)), ("imu", (6, 400)))}
    pack = PackedBatch(
        torch.cat(ids),
        torch.cat(wanted),
        tuple(map(len, ids)),
        (("image",),) * len(ids),
        {"image": inputs["image_values"], **values},
        torch.ones(len(ids)),
    )
    return float(model.eval()(packed=pack).nll.mean())


class Steps:
    """The losses that a trainer logs."""

    def __init__(self, trainer: Any) -> None:
        trainer.train()
        self.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def make_arguments(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "dataloader_pin_memory": False,
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.seconds
def test_a_step_of_transformers_trainer_has_the_packed_loss(
    checkpointing: bool, tmp_path: Path
) -> None:
    processor = make_processor()
    model = make_model(processor)
    pictures = [make_picture(0), make_picture(1)]
    inputs = processor(["a red circle", "a"], images=pictures, padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
    wanted = compute_packed_loss(model, inputs, labels)
    rows = [{**{k: v[i] for k, v in inputs.items()}, "labels": labels[i]} for i in range(2)]
    trainer = Trainer(
        model=model,
        args=TrainingArguments(gradient_checkpointing=checkpointing, **make_arguments(tmp_path)),
        train_dataset=rows,
    )
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    losses = Steps(trainer).losses
    assert losses == [pytest.approx(wanted, abs=1e-5)]
    moved = [n for n, p in model.named_parameters() if n in start and not torch.equal(p, start[n])]
    assert any("upm" in n for n in moved) and any("projectors.image" in n for n in moved)


@pytest.mark.slow
def test_a_step_of_trl_has_the_packed_loss(tmp_path: Path) -> None:
    from datasets import Dataset

    pytest.importorskip("trl", reason="it needs pyarrow 21")
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    processor = make_processor()
    model = make_model(processor)
    pictures = [make_picture(0), make_picture(1)]
    talks = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in (("What is it?", "a red circle"), ("And this?", "blue"))
    ]
    parts = [
        [
            {
                **talk[0],
                "content": [
                    {"type": "image", "image": p},
                    {"type": "text", "text": talk[0]["content"]},
                ],
            },
            talk[1],
        ]
        for talk, p in zip(talks, pictures, strict=True)
    ]
    inputs = processor.apply_chat_template(
        parts, tokenize=True, return_dict=True, processor_kwargs={"padding_side": "right"}
    )
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
    wanted = compute_packed_loss(model, inputs, labels)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(max_length=None, eos_token=None, **make_arguments(tmp_path)),
        train_dataset=Dataset.from_list(
            [{"messages": t, "images": [p]} for t, p in zip(talks, pictures, strict=True)]
        ),
        processing_class=processor,
    )
    assert Steps(trainer).losses == [pytest.approx(wanted, abs=1e-5)]


def test_a_batch_in_parts_is_divided_by_all_of_its_tokens() -> None:
    processor = make_processor()
    model = make_model(processor).eval()
    inputs = processor(["a red circle", "a"], padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, IGNORE)
    whole = model(**inputs, labels=labels).loss
    count = int((labels[:, 1:] != IGNORE).sum())
    halves = [
        model(
            **{k: v[i : i + 1] for k, v in inputs.items()},
            labels=labels[i : i + 1],
            num_items_in_batch=count,
        )
        for i in range(2)
    ]
    torch.testing.assert_close(sum(h.loss for h in halves), whole)
    with pytest.raises(UsageError, match="return_dict=False"):
        model(**inputs, return_dict=False)


def test_adapters_of_peft_train_the_llm_alone() -> None:
    from peft import LoraConfig, get_peft_model

    processor = make_processor()
    model = make_model(processor)
    inputs = processor("a red circle", images=make_picture(0))
    with torch.no_grad():
        before = model.eval()(**inputs).logits
    adapted: Any = get_peft_model(
        model, LoraConfig(target_modules=r"llm\..*\.(q_proj|v_proj)", r=2, task_type="CAUSAL_LM")
    )
    torch.testing.assert_close(adapted.eval()(**inputs).logits, before)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained and all(".llm." in name and "lora_B" in name for name in trained)
    merged = adapted.merge_and_unload()
    assert merged.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_a_pipeline_answers_about_a_picture(tmp_path: Path) -> None:
    processor = make_processor()
    model = make_model(processor)
    ask: Any = pipeline("image-text-to-text", model=model, processor=processor)
    picture = make_picture(0)
    question = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": question}]
    (answer,) = ask(text=messages, max_new_tokens=5, return_full_text=False)
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True
    )
    out = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert answer["generated_text"] == processor.decode(out, skip_special_tokens=True)
    (plain,) = ask(images=picture, text="a", max_new_tokens=5, return_full_text=False)
    inputs = processor("a", images=picture)
    out = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert plain["generated_text"] == processor.decode(out, skip_special_tokens=True)
