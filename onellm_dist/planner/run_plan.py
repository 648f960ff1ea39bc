"""The plan of a run: memory, speed, traffic, loading, checkpoints and hours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from onellm_dist.common.errors import UsageError
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.packing import TokenBudget
from onellm_dist.data.token_budget import read_budget
from onellm_dist.modalities import Modality, get_modality
from onellm_dist.model.adapters.lora import add_adapters
from onellm_dist.model.configuration import OneLLMConfig
from onellm_dist.model.losses.preference import prepare_preference
from onellm_dist.model.modality_tokens import find_idle_passes
from onellm_dist.model.model_kernels import set_kernels
from onellm_dist.model.onellm import OneLLMForConditionalGeneration
from onellm_dist.model.presets import build_config
from onellm_dist.model.quantised.linear import plan_layers
from onellm_dist.model.recompute import enable_activation_checkpointing
from onellm_dist.model.spans.positions import set_span_positions
from onellm_dist.planner.cost_model import PackCostModel, build_cost_model
from onellm_dist.planner.counting import PackCount, count_pack, measure_frozen_blocks
from onellm_dist.planner.hardware import GIGA, load_assumptions
from onellm_dist.planner.memory import (
    PRECISION_BYTES,
    MemoryPlan,
    ParameterCounts,
    StateBytes,
    compute_memory,
    compute_state,
    count_parameters,
)
from onellm_dist.planner.pack_shapes import (
    PackShape,
    count_batch_bytes,
    make_meta_batch,
    measure_sizes,
)
from onellm_dist.planner.time import (
    DeviceClock,
    DeviceTime,
    GpuCluster,
    StepTime,
    compute_host,
    compute_step,
)
from onellm_dist.planner.traffic import compute_traffic
from onellm_dist.planner.workload import DataShape, StepShape, pack_step
from onellm_dist.train.engine.description import StepTraffic
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.optim.optimizers import make_optimizer
from onellm_dist.train.optim.rules import prepare_parameters

FLOAT_BYTES = 4


@dataclass(frozen=True)
class LoadingPlan:
    """What the loader has to keep up with."""

    samples_per_second: float
    """Samples per second of a node."""
    cores_per_gpu: float
    """Cores that decode for one GPU."""
    read_mb_s: float
    """Megabytes per second that a node reads from disk or network."""


@dataclass(frozen=True)
class CheckpointPlan:
    """Checkpoints of the run."""

    bytes: float
    """Size of one of them: trainable weights and optimizer state, fp32."""
    stall: float
    """Seconds that training waits for one: the copy to the host."""
    count: int
    asynchronous: bool


@dataclass(frozen=True)
class RunPlan:
    """What a run needs and how long it takes."""

    parameters: ParameterCounts
    memory: MemoryPlan
    micro_batches: int
    """Micro-batches of each rank in a step."""
    largest: PackShape
    """The micro-batch that keeps most activations."""
    time: StepTime
    traffic: StepTraffic
    samples_per_second: float
    """Samples per second of all ranks."""
    flops: float
    """FLOPs of a step on all ranks, without recomputation."""
    mfu: float
    """Model FLOP/s over the peak. Attention counts; recomputation does not."""
    loading: LoadingPlan
    checkpoint: CheckpointPlan
    hours: float
    gpu_hours: float
    energy_kwh: float | None
    """Energy of the boards at the power that they may draw; None where it is not known."""
    engine: str
    """What the engine calls itself."""


def build_model(config: OneLLMConfig) -> OneLLMForConditionalGeneration:
    """A model whose parameters and buffers are on the meta device."""
    with torch.device("meta"):
        return OneLLMForConditionalGeneration(config)


@dataclass
class Planner:
    """Plans a recipe, and variations of it in budgets, recomputation and engine.

    The model is built once, and counted once for each mode of recomputation.

    Args:
        config: the recipe.
        cluster: the machine.
        data: the shape of the recipe's data.
    """

    config: RunConfig
    cluster: GpuCluster
    data: DataShape
    _models: dict[str, Any] = field(default_factory=dict)
    _costs: dict[str, PackCostModel] = field(default_factory=dict)
    _clocks: dict[str, DeviceClock] = field(default_factory=dict)
    _counts: dict[tuple[str, PackShape], PackCount] = field(default_factory=dict)
    _steps: dict[TokenBudget, StepShape] = field(default_factory=dict)

    @cached_property
    def modalities(self) -> dict[str, Modality]:
        """The model's modalities with the token counts of its encoder, in span order."""
        return get_modalities(load_model_config(self.config))

    def get_model(self, mode: str) -> Any:
        """The model, prepared as a run prepares it.

        Args:
            mode: `train.activation_checkpointing`.
        """
        if mode not in self._models:
            train = self.config.train
            dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
            model: Any = build_model(load_model_config(self.config))
            model.to(dtype)
            present = {name for names in self.data.combinations for name in names}
            if train.lora is not None:
                add_adapters(model, train.lora)
                model.to(dtype)
            prepare_parameters(model, train, self.config.optim, present)
            model.idle_passes = find_idle_passes(model, present)
            if train.preference is None:
                model.set_loss(train.loss)
            else:
                prepare_preference(model, train.preference)
            # What has `shared` constants are processors.
            set_kernels(model, train.kernels, "cpu" if self.cluster.gpu.shared else "cuda")
            enable_activation_checkpointing(model, mode)
            if self.config.engine.frozen_weights != "plain":
                plan_layers(
                    model,
                    self.config.engine.frozen_weights,
                    in_float8=self.cluster.gpu.multiplies_float8(train.precision),
                )
            self._models[mode] = model.train()
        return self._models[mode]

    def get_costs(self, mode: str) -> PackCostModel:
        """What micro-batches do with a mode of recomputation."""
        if mode not in self._costs:
            self._costs[mode] = build_cost_model(
                self.get_model(mode), self.data.combinations, self.modalities
            )
        return self._costs[mode]

    def get_clock(self, mode: str) -> DeviceClock:
        """How long micro-batches take on the device with a mode of recomputation."""
        if mode not in self._clocks:
            self._clocks[mode] = DeviceClock(
                self.get_costs(mode), self.cluster.gpu, self.config.train.precision
            )
        return self._clocks[mode]

    def get_step(self, config: RunConfig) -> StepShape:
        """The first step under a recipe's token budgets."""
        budget = read_budget(config.data)
        if budget not in self._steps:
            self._steps[budget] = pack_step(
                config.data, self.data, self.modalities, world_size=self.cluster.world_size
            )
        return self._steps[budget]

    def find_too_large(self, config: RunConfig) -> str | None:
        """Why a recipe's budgets cannot hold a sample; None: they hold all."""
        try:
            self.get_step(config)
        except UsageError as error:
            return error.what
        return None

    def find_largest(self, config: RunConfig) -> PackShape:
        """The micro-batch of the first step that keeps most activations."""
        costs = self.get_costs(config.train.activation_checkpointing)

        def count(shape: PackShape) -> float:
            return sum(costs.count_kept(measure_sizes(shape, self.modalities)).values())

        return max(dict.fromkeys(self.get_step(config).packs), key=count)

    def compute_state(self, config: RunConfig) -> StateBytes:
        """What a rank holds throughout a step."""
        return compute_state(
            get_engine(config.engine.name),
            config.engine,
            self.parameters,
            world_size=self.cluster.world_size,
            compute_bytes=PRECISION_BYTES[config.train.precision],
            state_bytes=self._state_bytes,
        )

    @cached_property
    def parameters(self) -> ParameterCounts:
        """Parameters of the model."""
        return count_parameters(self.get_model(self.config.train.activation_checkpointing))

    @property
    def _state_bytes(self) -> int:
        return FLOAT_BYTES * (1 + len(make_optimizer(self.config.optim).state_keys))

    def compute_memory(self, config: RunConfig) -> MemoryPlan:
        """Memory of a rank; its largest micro-batch is counted on the meta device."""
        mode, largest = config.train.activation_checkpointing, self.find_largest(config)
        batch = make_meta_batch(largest, list(self.modalities.values()))
        if (mode, largest) not in self._counts:
            self._counts[mode, largest] = count_pack(self.get_model(mode), batch)
        return compute_memory(
            self.compute_state(config),
            self._counts[mode, largest],
            self.cluster.gpu,
            inputs=count_batch_bytes(batch),
            buffers=self.compute_buffers(config),
        )

    def compute_buffers(self, config: RunConfig) -> float:
        """Bytes of the engine's buffers."""
        return get_engine(config.engine.name).buffer_bytes(
            config.engine,
            compute_bytes=PRECISION_BYTES[config.train.precision],
            parameters=self.parameters.total - self.parameters.quantised,
            largest_unit=self.parameters.largest_unit,
            stacks=self.parameters.stacks,
        )

    def compute_traffic(self, config: RunConfig) -> StepTraffic:
        """What the engine's collectives move."""
        mode, precision = config.train.activation_checkpointing, config.train.precision
        return compute_traffic(
            config.engine,
            self.get_model(mode),
            self.get_costs(mode).uses,
            world_size=self.cluster.world_size,
            compute_bytes=PRECISION_BYTES[precision],
        )

    def compute_time(self, config: RunConfig) -> StepTime:
        """Time of a step."""
        mode = config.train.activation_checkpointing
        clock, assumptions = self.get_clock(mode), load_assumptions()
        times = [
            [clock.measure(measure_sizes(shape, self.modalities)) for shape in rank]
            for rank in self.get_step(config).ranks
        ]
        slowest = [
            DeviceTime(max(t.forward for t in column), max(t.backward for t in column))
            for column in zip(*times, strict=True)
        ]
        hooks = get_engine(config.engine.name).host_costs(
            config.engine, frozen_blocks=measure_frozen_blocks(self.get_model(mode))
        )
        state = self.compute_state(config)
        return compute_step(
            slowest,
            compute_host(self.get_costs(mode), hooks, self.cluster.gpu.host or assumptions.host),
            self.compute_traffic(config),
            self.cluster,
            assumptions,
            # Gradients of what a rank steps are read, its weights and state read and written.
            optimizer_bytes=state.optimizer * FLOAT_BYTES / self._state_bytes
            + 2 * (state.optimizer + state.trained_weights),
        )

    def plan(self, config: RunConfig | None = None) -> RunPlan:
        """Plan the recipe, or a variation of it.

        Args:
            config: a recipe that differs in budgets, recomputation or engine alone.
        """
        config = config or self.config
        time, step = self.compute_time(config), self.get_step(config)
        costs = self.get_costs(config.train.activation_checkpointing)
        flops = sum(
            costs.count_flops(measure_sizes(shape, self.modalities), recompute=False)
            for shape in step.packs
        )
        peak = self.cluster.gpu.peak_tflops[config.train.precision] * 1e12
        world_size, rate = self.cluster.world_size, config.data.global_batch / time.total
        checkpoint = self._plan_checkpoint(config)
        seconds = config.train.steps * time.total + checkpoint.count * checkpoint.stall
        gpu_hours, watts = seconds / 3600 * world_size, self.cluster.gpu.board_watts
        return RunPlan(
            parameters=self.parameters,
            memory=self.compute_memory(config),
            micro_batches=step.micro_batches,
            largest=self.find_largest(config),
            time=time,
            traffic=self.compute_traffic(config),
            samples_per_second=rate,
            flops=flops,
            mfu=flops / time.total / (peak * world_size),
            loading=self._plan_loading(rate),
            checkpoint=checkpoint,
            hours=seconds / 3600,
            gpu_hours=gpu_hours,
            energy_kwh=None if watts is None else gpu_hours * watts / 1000,
            engine=get_engine(config.engine.name).describe(config.engine),
        )

    def _plan_loading(self, rate: float) -> LoadingPlan:
        assumptions = load_assumptions()
        decode = [
            sum(assumptions.media.get(x, assumptions.unknown_media).decode_ms for x in s.spans)
            for s in self.data.samples
        ]
        node = rate / self.cluster.nodes
        return LoadingPlan(
            samples_per_second=node,
            cores_per_gpu=rate / self.cluster.world_size * self.data.average(decode) / 1000,
            read_mb_s=node * self.data.average(self.data.sample_bytes) / 1e6,
        )

    def _plan_checkpoint(self, config: RunConfig) -> CheckpointPlan:
        size = self.parameters.trainable * self._state_bytes
        copy = size / self.cluster.world_size / (GIGA * self.cluster.gpu.to_host_gb_s)
        return CheckpointPlan(
            bytes=size,
            stall=copy,
            count=-(-config.train.steps // config.checkpoint.every),
            asynchronous=config.checkpoint.asynchronous,
        )


def load_model_config(config: RunConfig) -> OneLLMConfig:
    """The config of a recipe's model, from its folder or its preset."""
    found: OneLLMConfig = (
        build_config(str(config.model.preset))
        if config.model.path is None
        else OneLLMConfig.from_pretrained(config.model.path)
    )
    set_span_positions(found, config.model.span_positions)
    return found


def get_modalities(config: OneLLMConfig) -> dict[str, Modality]:
    """A model's modalities with the token counts of its encoder, in span order."""
    vision = config.vision
    return {
        name: get_modality(name).with_encoder(patches=vision.patches, prefix_tokens=vision.prefix)
        for name in config.modalities
    }


def vary(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """A recipe with other values of some keys.

    Args:
        config: the recipe.
        changes: `section.key` to value; `engine` to a whole section.
    """
    raw: dict[str, Any] = config.model_dump(by_alias=True)
    for key, value in changes.items():
        section, _, leaf = key.partition(".")
        if leaf:
            raw[section][leaf] = value
        else:
            raw[section] = value
    return RunConfig.model_validate(raw)
