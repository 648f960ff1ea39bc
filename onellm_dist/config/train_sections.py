"""The sections of a recipe that say what trains, and how: `train.*` and `optim.*`.

The docstring below a field is its reference documentation, as in `schema.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, PositiveInt, PrivateAttr, model_validator

from onellm_dist.config.section import Section


def _check_decay_rates(rates: tuple[float, ...]) -> tuple[float, ...]:
    if not all(0 <= rate < 1 for rate in rates):
        raise ValueError("a decay rate lies from 0 to below 1")
    return rates


DecayRates = Annotated[tuple[float, float], AfterValidator(_check_decay_rates)]
"""Decay rates of the averages of the gradient and of its square."""


if TYPE_CHECKING:
    Steps = int
else:
    Steps = PositiveInt | None
"""Null in a recipe that says `train.epochs`; a number wherever a run reads it
(`data.epochs.resolve_epochs`)."""


NO_LENGTH = "missing key train.steps, or train.epochs: the run has no length"


class ParameterRule(Section):
    """One rule of `train.parameters`: what it matches trains, or is frozen."""

    match: str = Field(min_length=1)
    """Glob pattern of parameter names (`llm.model.layers.*.mlp.*`); `*` also stands for dots. A
    pattern that matches no parameter is refused."""
    freeze: bool | None = None
    """Whether the parameters are frozen. Default: they train; only a rule that sets something else
    leaves weights frozen that have adapters in their place (`train.lora`)."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate; warm-up and schedule are scaled with it. Default: that of an earlier
    rule, or `optim.lr`."""
    weight_decay: float | None = Field(None, ge=0)
    """Weight decay; biases and norm weights never decay. Default: that of an earlier rule, or
    `optim.weight_decay`."""
    schedule: str | None = None
    """Schedule of the learning rate. Default: that of an earlier rule, or `optim.schedule`."""
    layer_decay: float | None = Field(None, gt=0, le=1)
    """Factor between the learning rates of a transformer block and of the one above it, in
    encoder, UPM and LLM. What stands after the last block has the full rate (arXiv 2106.08254).
    Default: that of an earlier rule, or 1."""

    @model_validator(mode="after")
    def _check_freeze(self) -> ParameterRule:
        if self.freeze and (given := self.list_settings()):
            raise ValueError(
                f"train.parameters: the rule {self.match} freezes, and sets {', '.join(given)}, "
                "which frozen parameters do not have"
            )
        return self

    def list_settings(self) -> list[str]:
        """The keys beside `match` and `freeze` that the rule sets."""
        keys = self.model_dump(exclude={"match", "freeze"}, exclude_none=True)
        return sorted(keys)


class LoraSection(Section):
    """`train.lora.*`: low-rank adapters on linear layers, by PEFT."""

    rank: PositiveInt = 16
    """Rank of the two factors of an adapter."""
    alpha: float = Field(32.0, gt=0)
    """The product of the factors counts alpha / rank times (with `rslora`: alpha divided by the
    root of the rank)."""
    targets: tuple[str, ...] = Field(("llm.*",), min_length=1)
    """Glob patterns of the linear layers of encoder, UPM and LLM that have an adapter
    (`llm.*_proj`). The LLM's head is matched by its own name alone. Default: every linear layer of
    the LLM but the head."""
    rslora: bool = False
    """Whether the scale is that of rank-stabilized LoRA (arXiv 2312.03732)."""
    dora: bool = False
    """Whether the adapters learn the norms of the weights' rows apart (DoRA, arXiv 2402.09353)."""


DPO = "dpo"
"""The `train.loss` that compares two answers."""


class DpoSection(Section):
    """`train.dpo.*`: direct preference optimization (arXiv 2305.18290, equation 7)."""

    beta: float = Field(0.1, gt=0)
    """How strongly the model is held to the reference: an answer's reward is beta times the
    difference of its log-probability (the sum over its tokens) from the reference's."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a pair's answers were swapped by mistake (conservative DPO)."""
    reference: Literal["adapter", "copy"] = "adapter"
    """The model that rewards are relative to. `adapter`: the same weights without their adapters;
    needs `train.lora`, and nothing but adapters may train. `copy`: a frozen copy of the parts that
    train, with the weights that the run started from; it costs their memory, and no `train.lora`
    is possible."""


class EarlyStoppingSection(Section):
    """`train.early_stopping.*`: ends a run whose validation loss no longer falls."""

    patience: PositiveInt
    """The run is done after this many validations in a row without a better loss."""
    min_delta: float = Field(0.0, ge=0)
    """A loss is better only if it lies at least this far below the best one so far."""


class TrainSection(Section):
    """`train.*`: the stage and its length."""

    stage: Literal["align", "tune", "joint", "custom"]
    """What trains; a named set of rules, which `train.parameters` extends. `align`: tokenizers,
    projections and UPM. `tune`: the LLM. `joint`: both. `custom`: nothing but what
    `train.parameters` says. What no rule matches is frozen."""
    parameters: tuple[ParameterRule, ...] = ()
    """Rules that follow those of the stage. A parameter takes each setting from the last rule that
    matches it and has that setting; whether it trains is up to the last rule that matches it.
    Default: none."""
    lora: LoraSection | None = None
    """Low-rank adapters. Parts with adapters (LLM, UPM, encoder) train through them alone, whatever
    the stage; a rule of `train.parameters` may add to that (`{match: llm.model.norm.*}`, or with
    `freeze: false` if it sets something else). Checkpoints then hold adapters in place of whole
    weights. Default: none."""
    encoder: Literal["frozen", "trainable"] = "frozen"
    """Whether the encoder trains too; `trainable` is for `align` only (paper, table 8: needs more
    memory, and is worse for every modality but audio)."""
    steps: Steps = None  # type: ignore[assignment]  # see Steps
    """Optimizer steps of the whole run. Default: those of `train.epochs`; one of the two is
    set."""
    epochs: float | None = Field(None, gt=0, le=1_000_000)
    """Length of the run in epochs of the mixture. An epoch has as many samples as all its datasets
    together. By their weights, some datasets may be read more often in it than others. Default:
    `train.steps` says the length."""
    early_stopping: EarlyStoppingSection | None = None
    """Ends the run before its last step; it needs `data.validation`. Default: all steps are
    done."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of forward and backward. Gradients accumulate in fp32 with either."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes in every block of the encoder (where gradients pass), UPM
    and LLM. `none`: nothing. `selective`: everything but matrix products and attention. `full`:
    everything."""
    kernels: Literal["auto", "plain", "fused"] = "auto"
    """How norms, activation functions, rotary positions and the loss are computed. `plain`: one
    torch operation after another. `fused`: in fewer kernels, which keep less for backward, and in
    bf16 round less often. `auto`: `fused` on a CUDA device, else `plain`."""
    compile: Literal["none", "blocks"] = "none"
    """Whether torch.compile fuses what stands before and after attention in each block of encoder,
    UPM and LLM. `blocks`: yes; compiling takes a few minutes in the first steps, and new shapes of
    packs compile nothing. Not under ZeRO-3, nor with `activation_checkpointing=selective`, rounded
    weights (`engine.frozen_weights`) or `train.loss: dpo`."""
    log_every: PositiveInt = 1
    """Steps between two lines of metrics on the terminal. `metrics.jsonl` has every step."""
    loss: str = "cross_entropy"
    """Loss of a supervised token: a registered name, or `module:function` of your own. `dpo`
    compares the two answers of preference pairs instead (`data.preference_pairs`)."""
    dpo: DpoSection | None = None
    """Settings of `train.loss: dpo`. Default: those of the section."""
    callbacks: tuple[str, ...] = ()
    """Callbacks that look at the run: `module:Class` each, or the name under which an installed
    package registers one."""
    _counted_from: float | None = PrivateAttr(None)

    @property
    def preference(self) -> DpoSection | None:
        """How two answers are compared; None: the loss is one of single tokens."""
        return (self.dpo or DpoSection()) if self.loss == DPO else None

    @property
    def counted_from(self) -> float | None:
        """The epochs from which `steps` was counted; None where the recipe says steps."""
        return self._counted_from

    def resolve_length(self, steps: int) -> TrainSection:
        """A copy that says `steps` in place of `epochs`."""
        found = self.model_copy(update={"steps": steps, "epochs": None})
        found._counted_from = self.epochs
        return found

    @model_validator(mode="after")
    def _check_length(self) -> TrainSection:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                "set one of train.steps and train.epochs; both say how long the run is"
            )
        if self.steps is None and self.epochs is None:
            raise ValueError(NO_LENGTH)
        return self

    @model_validator(mode="after")
    def _check_compile(self) -> TrainSection:
        if self.compile == "blocks" and self.activation_checkpointing == "selective":
            raise ValueError(
                "train.compile=blocks with train.activation_checkpointing=selective: single "
                "operations cannot be chosen within what is compiled; use none or full"
            )
        return self

    @model_validator(mode="after")
    def _check_encoder(self) -> TrainSection:
        if self.stage != "align" and self.encoder == "trainable":
            raise ValueError(
                "train.encoder=trainable needs train.stage=align; in other stages, a rule of "
                "train.parameters trains the encoder"
            )
        return self


class OptimSection(Section):
    """`optim.*`: the optimizer and its learning-rate schedule."""

    name: str = "adamw"
    """The optimizer: `adamw`, `lion`, `sgd`, or one that another package registers."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Settings of an optimizer other than AdamW: `{momentum: 0.9, nesterov: false}` for `sgd`,
    `{betas: [0.9, 0.99]}` for `lion`."""
    lr: float = Field(gt=0)
    """Peak learning rate, reached after the warm-up."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of a decaying schedule."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: `cosine` and `linear` decay to `optim.min_lr`, `constant`
    stays at `optim.lr`. `wsd` (warm-up, stable, decay) stays at `optim.lr` until
    `optim.decay_from`, and falls linearly to `optim.min_lr` from there on."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises linearly from 0. Default: no warm-up."""
    decay_steps: int | None = Field(None, gt=0)
    """Step at which the schedule ends. Default: `train.steps`."""
    decay_from: int | None = Field(None, ge=0)
    """`wsd` only: step from which the learning rate falls. A run that is still in its stable part
    may be resumed with another one. It lies after the warm-up and before the end of the
    schedule. Default: the last tenth of the steps after the warm-up decays (at least one step)."""
    betas: DecayRates = (0.9, 0.95)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon, added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay. It is not applied to biases and norm weights (as in the
    reference)."""
    grad_clip: float = Field(2.0, ge=0)
    """Maximum global gradient norm; larger gradients are scaled down to it. 0 turns clipping
    off."""

    @model_validator(mode="after")
    def _check_schedule(self) -> OptimSection:
        if self.min_lr > self.lr:
            raise ValueError(
                f"optim.min_lr={self.min_lr:g} is above optim.lr={self.lr:g}: the learning rate "
                "would rise over the run"
            )
        return self
