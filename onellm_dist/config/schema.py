"""The sections of a recipe, with the type, default and meaning of every key."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator


def _location(value: Any) -> Any:
    return value if not isinstance(value, str) or "://" in value else Path(value)


Location = Annotated[Path | str, BeforeValidator(_location)]
"""A local path, or a URL that fsspec reads (`s3://bucket/folder`), which stays as it is written."""


class Section(BaseModel):
    """A part of the recipe: immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunSection(Section):
    """`run.*`: where the run lives and its seed."""

    dir: Path = Path("runs/default")
    """The run directory: `config.yaml`, `metrics.jsonl`, `events.jsonl`, `ledger/`, `checkpoints/`, `tensorboard/`, `exit.json`."""
    seed: int = 0
    """Seeds the order, the mixture, augmentation and initialisation."""


class ModelSection(Section):
    """`model.*`: where the model comes from. Exactly one of `path` and `preset`."""

    path: Path | None = None
    """A `save_pretrained` directory (a converted or assembled model, or the end of an earlier stage)."""
    preset: Literal["onellm-7b", "toy", "smollm2-135m"] | None = None
    """A named architecture; `toy` and `onellm-7b` start from random weights, `smollm2-135m` loads its LLM."""
    init_from_image: tuple[str, ...] = ()
    """Modalities whose projections, queries, router and tags start as copies of image's (paper, section 3.3)."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        if (self.path is None) == (self.preset is None):
            raise ValueError("give exactly one of model.path and model.preset")
        return self


class MixtureEntry(Section):
    """One dataset of the mixture."""

    path: Location
    """The dataset's folder (with `manifest.json`) or its URL; a relative path starts at `data.root`."""
    weight: float = Field(1.0, gt=0)
    """Share of the samples, relative to the other entries."""


class ValidationSection(Section):
    """`data.validation`: a fixed set from another split of the mixture's datasets, run now and then without training on it."""

    split: str
    """The split; datasets that do not have it are left out."""
    samples: PositiveInt
    """Samples of the set, in the shares of the mixture; the same ones each time, at any number of ranks."""
    every: PositiveInt
    """Optimizer steps between two validations; one more comes after the last step."""
    generate: int = Field(0, ge=0)
    """So many of the samples are answered by the model each time: `validation_samples.jsonl`."""
    new_tokens: PositiveInt = 32
    """Longest generated answer."""


class DataSection(Section):
    """`data.*`: what is read, and how it is packed."""

    root: Location = Path(".")
    """Relative dataset paths start here: a folder, or a URL such as `s3://bucket/datasets`."""
    mixture: tuple[MixtureEntry, ...] = Field(min_length=1)
    """The datasets and their weights."""
    global_batch: PositiveInt
    """Samples an optimizer step, over all ranks."""
    workers: int = Field(2, ge=0)
    """Loader processes a rank; 0 reads in the training process. Never changes what is read."""
    prefetch: PositiveInt = 2
    """Micro-batches each worker keeps ready."""
    read_ahead_mb: PositiveInt = 256
    """Most megabytes of remote shards that each worker holds ahead of need."""
    cache_dir: Path | None = None
    """A folder on this node's disk for what is read of remote shards, shared by its processes; none: nothing is kept."""
    cache_gb: float = Field(100.0, gt=0)
    """Most gigabytes (10^9 bytes) in `data.cache_dir`; what was used longest ago goes first."""
    pack_llm_tokens: PositiveInt = 4096
    """Most LLM positions of a micro-batch."""
    pack_encoder_tokens: PositiveInt = 16384
    """Most encoder tokens of a micro-batch."""
    text_format: Literal["caption", "conversation", "chat"] = "caption"
    """`caption`: BOS, caption, EOS, all but BOS supervised (pretraining). `conversation`: the reference's prompt, answers supervised.
    `chat`: the same in the LLM's own chat template."""
    max_text_tokens: PositiveInt = 96
    """Longer texts are cut to this many tokens (the reference's max_words: 96 pretraining, 2018 tuning)."""
    augment: bool = True
    """Training transforms (random crops, fbank masking); false: the evaluation transforms."""
    max_skipped_samples: int = Field(100, ge=0)
    """More unreadable samples than this stop the run."""

    validation: ValidationSection | None = None
    """Losses of a fixed set of another split go to `validation.jsonl`; none where not given."""
    new_phase: bool = False
    """At a resume with another mixture, batch or text format: begin a new plan segment there. Otherwise that is refused."""

    def place(self, entry: MixtureEntry) -> Path | str:
        """Where a dataset of the mixture lies: a path, or a URL."""
        if isinstance(entry.path, str) or isinstance(self.root, Path):
            return entry.path if isinstance(entry.path, str) else Path(self.root) / entry.path
        return (
            str(entry.path)
            if entry.path.is_absolute()
            else f"{self.root.rstrip('/')}/{entry.path.as_posix()}"
        )


class TrainSection(Section):
    """`train.*`: the stage and its length."""

    stage: Literal["align", "tune"]
    """`align`: tokenizers and UPM train, LLM and encoder are frozen. `tune`: the LLM trains, the rest is frozen."""
    encoder: Literal["frozen", "trainable"] = "frozen"
    """`trainable`: in `align`, the encoder trains too (paper, table 8: more memory, and worse but for audio)."""
    steps: PositiveInt
    """Optimizer steps of the whole run."""
    precision: Literal["bf16", "fp32"] = "bf16"
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What is recomputed in backward, in every block of encoder (where gradients pass), UPM and LLM: nothing; all but matrix products and
    attention (`selective`); or all of it (`full`)."""
    log_every: PositiveInt = 1
    """Steps between lines of `metrics.jsonl` on the terminal (the file has every step)."""

    @model_validator(mode="after")
    def _encoder_trains_in_align(self) -> TrainSection:
        if self.stage != "align" and self.encoder == "trainable":
            raise ValueError(
                "train.encoder=trainable is for train.stage=align: in tune the LLM alone trains"
            )
        return self


class OptimSection(Section):
    """`optim.*`: AdamW and its schedule (linear warm-up, cosine to `min_lr`)."""

    lr: float = Field(gt=0)
    min_lr: float = Field(0.0, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int | None = Field(None, gt=0)
    """Step at which the cosine ends; `train.steps` where not given."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    """Not applied to biases and RMSNorm weights (as the reference does)."""
    grad_clip: float = Field(2.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""


class EngineSection(Section):
    """`engine.*`: who shards the model."""

    name: Literal["deepspeed", "fsdp"] = "deepspeed"
    config: Path | None = None
    """A DeepSpeed JSON (a path, or a name in `ds_configs/` such as `zero3`); `zero3` where not given. `fsdp` does not
    read it."""
    shard_ranks: PositiveInt | None = None
    """`fsdp` only: hybrid sharding over groups of so many neighbouring ranks (a node's), each group holding a whole copy; all ranks
    share one copy where not given."""
    reduce_every: Literal["micro_batch", "step"] = "micro_batch"
    """`fsdp` only: reduce gradients after every micro-step, so that a rank keeps its shard of them, or once a step: less traffic, but
    every rank keeps whole fp32 gradients of what trains."""

    @model_validator(mode="after")
    def _keys_of_this_engine(self) -> EngineSection:
        if self.name == "deepspeed" and (
            self.shard_ranks is not None or self.reduce_every != "micro_batch"
        ):
            raise ValueError(
                "engine.shard_ranks and engine.reduce_every are for engine.name=fsdp (DeepSpeed: zero_hpz_partition_size)"
            )
        return self


class CheckpointSection(Section):
    """`checkpoint.*`: when checkpoints are written and which one is resumed."""

    every: PositiveInt = 500
    """Optimizer steps between two checkpoints; one more is written at the end, and when the run is asked to stop."""
    every_minutes: float | None = Field(None, gt=0)
    """Also after so many minutes, by rank 0's clock, at the end of the step."""
    keep: PositiveInt = 2
    """The newest ones that stay."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose step is a multiple of this stay for ever."""
    keep_every_hours: float | None = Field(None, gt=0)
    """The first checkpoint stays for ever, and then one whenever so many hours lie between it and the last that stayed."""
    asynchronous: bool = True
    """Written in the background from a copy in host memory (12 bytes a trainable element, over the ranks); false: training waits, and
    there is no copy."""
    resume: Literal["auto", "never"] | Path = "auto"
    """`auto`: the newest whole checkpoint of `run.dir`, if there is one; `never`; or a checkpoint directory. The last two hold for the
    first start of a job: its requeues go on as with `auto`."""


class TrackSection(Section):
    """`track.*`: who else is told the run's figures, and what is looked at more closely."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    trackers: tuple[str, ...] = Field((), alias="with")
    """Written `track.with`: accelerate's trackers beside TensorBoard (wandb, mlflow, aim, comet_ml, ...), or `module:Class` of your own."""
    project: str = "onellm"
    """The project that trackers show the run under."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Tracker -> what it is started with: `{wandb: {name: stage1, mode: offline}}`."""
    profile_steps: tuple[int, int] | None = None
    """First and last step of which a trace is written to `profiles/`; a file `profile` in the run directory asks for the next two."""
    underused_expert_share: float = Field(0.05, ge=0, le=1)
    """An expert to which no modality gives this share of its weight ..."""
    underused_expert_steps: PositiveInt = 200
    """... for so many steps is warned about."""


class StabilitySection(Section):
    """`stability.*`: what is done about losses and gradients that are not finite or leap, and about steps that do not end."""

    policy: Literal["skip", "rollback", "stop"] = "skip"
    """`skip` throws the step away on all ranks; `rollback` goes back to the last checkpoint and marks the samples as skipped_samples;
    `stop` ends the run."""
    window: PositiveInt = 128
    """Steps that a loss and a gradient norm are compared with (a leap can be seen once a quarter of them, at least 8, are there)."""
    threshold: float = Field(10.0, ge=0)
    """A loss or gradient norm that lies so many robust standard deviations (1.4826 MAD) above the window's median is a spike; 0: none."""
    max_skipped: PositiveInt = 10
    """So many steps thrown away in a row stop the run."""
    max_rollbacks: int = Field(5, ge=0)
    """More roll-backs than this, earlier starts included, stop the run."""
    hang_minutes: float = Field(15.0, ge=0)
    """A step in which no rank gets on for so long ends the run, with every rank's stack in `hangs/`; 0: nobody watches."""
    first_step_minutes: float = Field(30.0, gt=0)
    """The same for each phase of a start, the first step included (compilers run, caches are cold)."""
    checkpoint_minutes: float = Field(30.0, gt=0)
    """The same for waiting for a checkpoint or an export."""
    validation_minutes: float = Field(30.0, gt=0)
    """The same for a validation."""


class LaunchSection(Section):
    """`launch.*`: used only where no launcher (deepspeed, torchrun, srun) started us."""

    ranks: int | None = Field(None, gt=0)
    """Local ranks; every GPU, or 1 on a CPU, where not given."""


class RunConfig(Section):
    """A whole recipe. Attribute names are the YAML's keys."""

    run: RunSection = RunSection()
    model: ModelSection
    data: DataSection
    train: TrainSection
    optim: OptimSection
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    track: TrackSection = TrackSection()
    stability: StabilitySection = StabilitySection()
    launch: LaunchSection = LaunchSection()

    def to_yaml(self) -> str:
        """The resolved recipe as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False)
