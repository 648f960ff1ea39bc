"""The sections of a recipe, with the type, default and meaning of every key.

The docstring below a field is its reference documentation: `describe_keys` and the documentation
site show it. It says what the key does, its unit, and what the default means.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveInt, model_validator

from onellm_dist.common.media_size import MOST_SPANS
from onellm_dist.common.secrets import mask_value
from onellm_dist.common.workers.sandbox import SAMPLE_MB, SAMPLE_SECONDS
from onellm_dist.config.pair_check import check_pairs
from onellm_dist.config.paths import LocalPath, Location
from onellm_dist.config.section import Section
from onellm_dist.config.token_budget import AUTO, PackTokens
from onellm_dist.config.train_sections import OptimSection, TrainSection
from onellm_dist.config.yaml_text import dump_yaml

MOST_STEPS = 1 << 40
MOST_SAMPLES = 1 << 20
"""No run has more steps, or more samples in one: records of a run that say so are damaged."""
SpanCount = Annotated[int, Field(gt=0, le=MOST_SPANS)]


class RunSection(Section):
    """`run.*`: the run directory and the seed."""

    dir: LocalPath = Path("runs/default")
    """The run directory. It receives `config.yaml`, `metrics.jsonl`, `events.jsonl`, `samples/`,
    `checkpoints/`, `tensorboard/` and `exit.json`."""
    seed: int = Field(0, ge=0, lt=1 << 63)
    """Seed of the sample order, the mixture, augmentation and initialisation. Two runs with the
    same seed and data read the same samples in the same steps."""


class ModelSection(Section):
    """`model.*`: where the model comes from. Exactly one of `path` and `preset` is set."""

    path: LocalPath | None = None
    """A `save_pretrained` directory: a converted or assembled model, or the `model/` folder that an
    earlier stage exported."""
    preset: Literal["onellm-7b", "toy", "smollm2-135m"] | None = None
    """A named architecture. `toy` and `onellm-7b` start from random weights; `smollm2-135m` loads
    the pretrained LLM of that name and starts the rest from random weights."""
    init_from_image: tuple[str, ...] = ()
    """Modalities whose projections, queries, router and tags start as copies of image's (paper,
    section 3.3); learned span positions (`model.span_positions`) are not copied. Default: none."""
    span_positions: Literal["none", "fixed", "learned"] | None = None
    """How the LLM knows the spans of one medium from each other (`data.spans`): `fixed` adds sines
    and cosines of a span's number to its tokens, `learned` a trained row, which starts at zero; the
    first span of a medium gets nothing. Default: as in the model of `model.path`; `none` for a
    preset."""

    @model_validator(mode="after")
    def _require_one_source(self) -> ModelSection:
        if (self.path is None) == (self.preset is None):
            raise ValueError("set exactly one of model.path and model.preset")
        return self


class MixtureEntry(Section):
    """One dataset of `data.mixture`."""

    path: Location
    """The dataset's folder (the one with `manifest.json`) or its URL. A relative path is resolved
    against `data.root`."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=True)  # named with its dataset
    """Share of the samples, relative to the weights of the other datasets."""

    def locate(self, root: Path | str) -> Path | str:
        """Return the dataset's path or URL, where `data.root` is `root`."""
        if isinstance(self.path, str) or isinstance(root, Path):
            return self.path if isinstance(self.path, str) else Path(root) / self.path
        if self.path.is_absolute():
            return str(self.path)
        return f"{root.rstrip('/')}/{self.path.as_posix()}"


class ValidationSection(Section):
    """`data.validation.*`: a fixed validation set from another split of the mixture's datasets."""

    split: str
    """The split to validate on. Datasets of the mixture that lack it are left out."""
    samples: PositiveInt
    """Samples of the validation set, shared among the datasets by their weights. The set is the
    same every time, on any number of ranks."""
    every: PositiveInt
    """Optimizer steps between two validations; another one follows the last step."""
    generate: int = Field(0, ge=0)
    """Number of validation samples for which the model generates an answer each time; the answers
    are written to `validation_samples.jsonl`. Default: none."""
    new_tokens: PositiveInt = 32
    """Maximum length of a generated answer, in tokens."""
    tasks: tuple[str, ...] = ()
    """Benchmarks (`onellm evaluate --list`) for the checkpoints that are kept forever, and for the
    last one. They answer after the training of local ranks, or in a Slurm job of their own that the
    run's job script submits. Scores are written to `validation.jsonl`. Default: none."""
    tasks_data: LocalPath | None = None
    """Folder of their datasets (`gqa-eval/` and so on). Default: `data.root`."""
    tasks_limit: PositiveInt | None = None
    """How many questions of each task are asked, from the first on. Default: all."""


class DataSection(Section):
    """`data.*`: what is read, and how it is packed."""

    root: Location = Path(".")
    """Folder or URL (such as `s3://bucket/datasets`) against which relative dataset paths are
    resolved. Default: the current directory."""
    mixture: tuple[MixtureEntry, ...] = Field(min_length=1)
    """The datasets and their weights."""
    global_batch: int = Field(gt=0, le=MOST_SAMPLES)
    """Samples per optimizer step, over all ranks."""
    follow_links: bool = False
    """Whether the tars and indexes of a dataset may be links that lead out of its folder. Default:
    such a dataset is refused."""
    workers: int = Field(2, ge=0)
    """Loader processes per rank; 0 reads in the training process. The number never changes what is
    read."""
    prefetch: PositiveInt = 2
    """Micro-batches that each loader process keeps ready."""
    read_ahead_mb: PositiveInt = 256
    """Maximum amount of remote shard data, in MiB, that each loader process fetches ahead of
    need."""
    cache_dir: LocalPath | None = None
    """Folder on a local disk of the node that caches what is read from remote shards; all processes
    of the node share it. Default: nothing is cached."""
    cache_gb: float = Field(100.0, gt=0)
    """Maximum size of `data.cache_dir` in gigabytes (10^9 bytes). The least recently used data is
    removed first."""
    pack_llm_tokens: PackTokens = 4096
    """Maximum number of LLM positions in a micro-batch: text tokens and media spans. `auto`: the
    planner finds both budgets at the start for the devices at hand, and after an out-of-memory
    all ranks start again with smaller ones."""
    pack_encoder_tokens: PackTokens = 16384
    """Maximum number of encoder tokens in a micro-batch (257 per image with CLIP ViT-L/14); `auto`
    with `data.pack_llm_tokens`."""
    text_format: Literal["caption", "conversation", "chat"] = "caption"
    """How a sample's text is laid out. `caption`: BOS, caption, EOS, with everything but BOS
    supervised (pretraining). `conversation`: the reference's prompt, with the answers supervised.
    `chat`: the LLM's own chat template, with the answers supervised."""
    max_text_tokens: PositiveInt = 96
    """Longer texts are cut to this many tokens (the reference's `max_words`: 96 for pretraining,
    2018 for tuning)."""
    preference_pairs: bool = False
    """Whether every sample is a preference pair: a conversation that a `chosen` and a `rejected`
    answer follow, for `train.loss: dpo`. Each of its two texts is cut to `data.max_text_tokens`;
    its media are encoded once, and count once in `data.pack_encoder_tokens`."""
    spans: dict[str, SpanCount] = Field(default_factory=dict)
    """Modality to the most spans that the media of one sample may take: `{image: 5, audio: 6,
    video: 4}`. A sound takes one for each 10.24 seconds, a film one for each 10 seconds, a picture
    one for the whole and one for each tile of the best grid; several media of a sample share them.
    The indexes must state sizes (`onellm shards index --media`). At most 128. Default: one span
    each."""
    augment: bool = True
    """Whether the training transforms are used (random crops, spectrogram masking); false uses the
    evaluation transforms."""
    sample_seconds: float = Field(SAMPLE_SECONDS, ge=0)
    """Seconds that a sample may take to decode in a loader process: CPU time, or time asleep. One
    that takes longer is read once more in a fresh process, and then skipped. 0: any time."""
    sample_mb: int = Field(SAMPLE_MB, ge=0)
    """Memory, in MiB, that a sample may need while a loader process reads and decodes it. One that
    needs more is read once more in a fresh process, and then skipped. 0: any amount."""
    max_skipped_samples: int = Field(100, ge=0)
    """The run stops when more samples than this could not be read."""
    exclude: LocalPath | None = None
    """A list of samples to leave out, one `dataset/shard/key` a line (`dataset/shard`: a whole
    shard). They keep their places with zero weight, so that all other samples stay where they
    were; a changed list holds from the next start on. `onellm samples exclude` keeps such a list in
    the run directory, which is always read. Default: none."""
    validation: ValidationSection | None = None
    """The validation set; its losses are written to `validation.jsonl`. Default: no validation."""
    new_phase: bool = False
    """Whether a resumed run may continue with another mixture, batch size or text format. If so, a
    new data phase begins at that step; otherwise the change is refused."""

    @property
    def finds_budgets(self) -> bool:
        """Whether the token budgets are found at the start."""
        return AUTO in (self.pack_llm_tokens, self.pack_encoder_tokens)

    @property
    def answers(self) -> int:
        """Texts of a sample: 2 of a preference pair."""
        return 2 if self.preference_pairs else 1

    @model_validator(mode="after")
    def _check_budgets(self) -> DataSection:
        if self.finds_budgets and self.pack_llm_tokens != self.pack_encoder_tokens:
            raise ValueError(
                "data.pack_llm_tokens and data.pack_encoder_tokens: both are auto, or both are "
                "numbers"
            )
        return self

    def locate(self, entry: MixtureEntry) -> Path | str:
        """Return the path or URL of a dataset of the mixture."""
        return entry.locate(self.root)


class EngineSection(Section):
    """`engine.*`: what shards the model over the ranks."""

    name: Literal["deepspeed", "fsdp"] = "deepspeed"
    """The engine. Both give the same training result; checkpoints of either load in the other."""
    config: LocalPath | None = None
    """`deepspeed` only: a DeepSpeed JSON, as a path or as a name in `ds_configs/`. Default:
    `zero3`."""
    frozen: Literal["auto", "sharded", "resident"] = "auto"
    """Where weights that do not train lie. `sharded`: over the ranks like all others; they are
    gathered in every micro-batch. `resident`: complete on every rank, without that traffic (FSDP2;
    ZeRO-1 and 2 always do so, ZeRO-3 never). `auto`: each start asks the planner, which says
    `resident` where a step is faster and a tenth of the memory stays free (`onellm plan` shows it);
    `sharded` on devices that the planner does not know, such as processors."""
    frozen_weights: Literal["plain", "fp8", "int8", "nf4"] = "plain"
    """What the frozen linear layers of the LLM, but for its head, are held in. `plain`:
    `train.precision`. `fp8`: float8 (e4m3) and a scale for each row; inputs are rounded likewise,
    and GPUs of compute capability 8.9 and above multiply in float8. `int8`: 8 bits and a scale for
    each row. `nf4`: 4 bits and a scale for each 64 weights (QLoRA, arXiv 2305.14314). The last two
    need torchao, and are expanded wherever they are used. Weights that are not plain are
    complete on every rank under any engine, and checkpoints do not hold them."""
    shard_ranks: PositiveInt | None = None
    """`fsdp` only: number of neighbouring ranks (usually those of a node) that share one copy of
    the model; each such group holds a complete copy. Default: all ranks share one copy."""
    reduce_every: Literal["micro_batch", "step"] = "micro_batch"
    """`fsdp` only: when gradients are reduced over the ranks. `micro_batch`: after each, so that a
    rank keeps only its shard of the gradients. `step`: once a step, which needs less traffic, but
    every rank keeps complete fp32 gradients of all trainable parameters; where frozen weights are
    resident, these parameters are gathered once a step too, and stay so until its end."""
    prefetch: int = Field(0, ge=0)
    """`fsdp` only: how many units (blocks, or what `unit_parameters` joins) are gathered ahead of
    the one at work, in forward and backward. They are asked for as soon as its own weights are
    there. 0: one, when the host comes to it."""
    unit_parameters: int = Field(0, ge=0)
    """`fsdp` only: consecutive blocks of a stack are gathered and reduced as one until they have
    this many sharded parameters: fewer, larger messages, and more memory. 0: each by itself."""

    @model_validator(mode="after")
    def _check_frozen_weights(self) -> EngineSection:
        if self.frozen_weights != "plain" and self.frozen == "sharded":
            raise ValueError(
                f"engine.frozen=sharded with engine.frozen_weights={self.frozen_weights}: "
                "quantised weights are complete on every rank; set engine.frozen=auto"
            )
        return self


class CheckpointSection(Section):
    """`checkpoint.*`: when checkpoints are written, and which one is resumed."""

    every: PositiveInt = 500
    """Optimizer steps between two checkpoints. One more is written at the end of the run, and when
    the run is asked to stop."""
    every_minutes: float | None = Field(None, gt=0)
    """Minutes between two checkpoints, by rank 0's clock; one is written at the end of the step in
    which they are over. Default: only `checkpoint.every` counts."""
    keep: PositiveInt = 2
    """Number of most recent checkpoints that are kept."""
    keep_every: PositiveInt | None = None
    """Checkpoints whose step is a multiple of this are kept forever. Default: none."""
    keep_every_hours: float | None = Field(None, gt=0)
    """The first checkpoint is kept forever, and then one whenever this many hours have passed since
    the last one kept that way. Default: none."""
    asynchronous: bool = True
    """Whether checkpoints are written in the background from a copy in host memory (12 bytes per
    trainable element, divided among the ranks). False: training waits, and no copy is made."""
    resume: Literal["auto", "never"] | LocalPath = "auto"
    """What the run resumes from. `auto`: the latest complete checkpoint of `run.dir`, if there is
    one. `never`: nothing. A path: that checkpoint directory. The last two apply to the first start
    of a job; when it is requeued, it resumes as with `auto`."""


class TrackSection(Section):
    """`track.*`: experiment trackers, profiling and warnings about experts."""

    model_config = ConfigDict(populate_by_name=True)

    trackers: tuple[str, ...] = Field((), alias="with")
    """Trackers that receive the metrics beside TensorBoard: names that accelerate knows (`wandb`,
    `mlflow`, `aim`, `comet_ml`, ...) or `module:Class` of your own. Default: none."""
    project: str = "onellm"
    """Project under which trackers show the run."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Start options of each tracker, by its name: `{wandb: {name: stage1, mode: offline}}`."""
    profile_steps: tuple[int, int] | None = None
    """First and last step whose trace is written to `profiles/`. A file named `profile` in the run
    directory asks for a trace of the next two steps at any time. Default: none."""
    underused_expert_share: float = Field(0.05, ge=0, le=1)
    """An expert counts as underused while no modality gives it at least this share of its router
    weight."""
    underused_expert_steps: PositiveInt = 200
    """A warning is logged when an expert has been underused for this many steps."""

    @model_validator(mode="after")
    def _check_profile(self) -> TrackSection:
        first, last = self.profile_steps or (0, 0)
        if not 0 <= first <= last:
            raise ValueError(
                f"track.profile_steps=[{first}, {last}]: give the first and the last step"
            )
        return self


class StabilitySection(Section):
    """`stability.*`: loss and gradient spikes, values that are not finite, and hangs."""

    policy: Literal["skip", "rollback", "stop"] = "skip"
    """What happens at a spike or a value that is not finite. `skip`: no rank applies the step.
    `rollback`: the run returns to its last checkpoint and excludes the offending samples. `stop`:
    the run ends."""
    window: PositiveInt = 128
    """Number of recent steps with which a loss and a gradient norm are compared. Spikes can be
    detected once a quarter of them (at least 8) are recorded."""
    threshold: float = Field(10.0, ge=0)
    """A loss or gradient norm is a spike if it lies more than this many robust standard deviations
    (1.4826 MAD) above the median of the window. 0 turns spike detection off."""
    max_skipped: PositiveInt = 10
    """The run stops after this many skipped steps in a row."""
    max_rollbacks: int = Field(5, ge=0)
    """The run stops at more rollbacks than this; earlier starts of the run count."""
    hang_minutes: float = Field(15.0, ge=0)
    """The run ends if no rank makes progress within a step for this many minutes; the stack of
    every rank is written to `hangs/`. 0 turns the watchdog off."""
    first_step_minutes: float = Field(30.0, gt=0)
    """Minutes without progress that are allowed in each part of a start, the first step included
    (kernels compile, caches are cold)."""
    checkpoint_minutes: float = Field(30.0, gt=0)
    """Minutes that a checkpoint or an export may take while training waits for it."""
    validation_minutes: float = Field(30.0, gt=0)
    """Minutes that a validation may take."""


class LaunchSection(Section):
    """`launch.*`: local ranks, if no launcher (deepspeed, torchrun, srun) started the process."""

    ranks: int | None = Field(None, gt=0)
    """Number of local ranks. Default: one per GPU, or 1 on a machine without GPUs."""


class RunConfig(Section):
    """A complete recipe. Attribute names are the keys of the YAML file."""

    run: RunSection = RunSection()
    """The run directory and the seed."""
    model: ModelSection
    """Where the model comes from."""
    data: DataSection
    """What is read, and how it is packed."""
    train: TrainSection
    """The stage and its length."""
    optim: OptimSection
    """The optimizer and its learning-rate schedule."""
    engine: EngineSection = EngineSection()
    """What shards the model over the ranks."""
    checkpoint: CheckpointSection = CheckpointSection()
    """When checkpoints are written, and which one is resumed."""
    track: TrackSection = TrackSection()
    """Experiment trackers, profiling and warnings about experts."""
    stability: StabilitySection = StabilitySection()
    """Loss and gradient spikes, values that are not finite, and hangs."""
    launch: LaunchSection = LaunchSection()
    """Local ranks, if no launcher started the process."""

    @model_validator(mode="after")
    def _check_early_stopping(self) -> RunConfig:
        if self.train.early_stopping is not None and self.data.validation is None:
            raise ValueError("train.early_stopping needs data.validation: it looks at its losses")
        return self

    @model_validator(mode="after")
    def _check_pairs(self) -> RunConfig:
        check_pairs(
            self.train,
            pairs=self.data.preference_pairs,
            captions=self.data.text_format == "caption",
            generates=self.data.validation is not None and self.data.validation.generate > 0,
            quantised=self.engine.frozen_weights != "plain",
        )
        return self

    def to_yaml(self) -> str:
        """Return the complete recipe, defaults included and secrets masked, as YAML."""
        values = mask_value(self.model_dump(mode="json", by_alias=True))
        return dump_yaml(values)
