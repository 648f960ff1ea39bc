"""The paper's model with random weights, drawn on the device, and packs of its stages."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onellm_dist.config.train_sections import OptimSection, TrainSection
from onellm_dist.modalities import get_modality
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.modality_tokens import find_idle_passes
from onellm_dist.model.model_kernels import set_kernels
from onellm_dist.model.presets import build_config
from onellm_dist.model.recompute import enable_activation_checkpointing
from onellm_dist.model.weights.lazy import build_empty_model
from onellm_dist.packed import IGNORE, PackedBatch
from onellm_dist.planner.pack_shapes import PackShape, SampleShape
from onellm_dist.train.engine.parameters import ParameterOwners
from onellm_dist.train.optim.rules import prepare_parameters


@dataclass(frozen=True)
class Setting:
    """A model as a run would prepare it."""

    stage: str = "align"
    kernels: str = "fused"
    recompute: str = "none"
    leaves_out_idle_passes: bool = True
    present: tuple[str, ...] = ("image",)


@dataclass(frozen=True)
class Workload:
    """Where everything runs, and at which size.

    Args:
        tiny: the toy model on few samples, to test the scripts.
    """

    tiny: bool
    images: int

    @property
    def device(self) -> torch.device:
        """The GPU, or the CPU."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the model computes in: bf16 on a GPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def config(self) -> OneLLMConfig:
        """The model's."""
        return build_config("toy" if self.tiny else "onellm-7b")

    def build(self, setting: Setting) -> Any:
        """The model of a setting, its weights drawn on the device in about a second."""
        model = build_empty_model(self.config)
        draw_weights(model, self.device, self.dtype)
        train = TrainSection.model_validate({"stage": setting.stage, "steps": 1})
        prepare_parameters(model, train, OptimSection(lr=1e-5), set(setting.present))
        if setting.leaves_out_idle_passes:
            model.idle_passes = find_idle_passes(model, setting.present)
        set_kernels(model, setting.kernels, self.device.type)
        enable_activation_checkpointing(model, setting.recompute)
        return model.train()

    def make_batch(self, pack: PackShape, seed: int = 0) -> PackedBatch:
        """A micro-batch of this shape with random content, in page-locked memory."""
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.config.text_config.vocab_size
        counts = [sample.text_tokens for sample in pack]
        ids = torch.randint(3, vocabulary, (sum(counts),), generator=generator)
        labels, end = torch.full_like(ids, IGNORE), 0
        for sample in pack:
            end += sample.text_tokens
            targets = slice(end - sample.supervised_tokens, end)
            labels[targets] = ids[targets]
        values = {}
        for name in self.config.modalities:
            number = sum(sample.spans.count(name) for sample in pack)
            modality = get_modality(name)
            drawn = torch.rand((number, *modality.value_shape))
            pixels = modality.loader_dtype == torch.uint8
            values[name] = (drawn * 255).to(torch.uint8) if pixels else drawn
        batch = PackedBatch(
            ids,
            labels,
            tuple(counts),
            tuple(sample.spans for sample in pack),
            values,
            torch.ones(len(pack)),
            supervised=(labels != IGNORE).nonzero().squeeze(1),
        )
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def make_captions(self, images: int, seed: int) -> PackShape:
        """Images with captions as long as LAION's: log-normal, 17 tokens on average, 96 at most."""
        drawn = random.Random(seed)
        counts = [max(3, min(96, int(drawn.lognormvariate(2.6, 0.6)) + 2)) for _ in range(images)]
        return tuple(SampleShape(("image",), count, count - 1) for count in counts)

    def make_stage1(self) -> list[PackShape]:
        """The micro-batches of a step of stage I."""
        return [self.make_captions(max(1, self.images - i), 10 + i) for i in range(3)]

    def make_stage2(self) -> list[PackShape]:
        """A mixed micro-batch of stage II."""
        counts = {"image": 8, "video": 7, "audio": 8, "point": 8}
        if self.tiny:
            counts = dict.fromkeys(counts, 1)
        return [tuple(SampleShape((name,), 22, 21) for name, n in counts.items() for _ in range(n))]

    def make_tune(self) -> list[PackShape]:
        """Conversations about images."""
        text, targets, count = (40, 20, 2) if self.tiny else (224, 120, 32)
        return [(SampleShape(("image",), text, targets),) * count]

    def make_reference(self) -> list[PackShape]:
        """The reference's batch: 40 captions, padded to 96 words, the head on every position."""
        return [(SampleShape(("image",), 96, 95),) * (2 if self.tiny else 40)]


@torch.no_grad()
def draw_weights(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give a model on the meta device weights of a usual size."""
    owners = ParameterOwners(model)
    for name, parameter in list(model.named_parameters()):
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        if parameter.ndim > 1:
            values.normal_(0, 0.02)
        else:
            values.fill_(0.0 if name.endswith("bias") else 1.0)
        owners.replace(name, nn.Parameter(values))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
