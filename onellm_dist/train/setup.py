"""Everything a run is made of, built in order: directory, model, plan, engine, checkpoint, loader, and what watches over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from onellm_dist import __version__
from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.files import repair_last_line
from onellm_dist.common.run_files import MODEL
from onellm_dist.config.schema import RunConfig
from onellm_dist.data.loader import Loader
from onellm_dist.data.micro_batch import MicroBatch
from onellm_dist.data.phases import DataPhase
from onellm_dist.data.plan import Plan
from onellm_dist.data.validation import open_validation_plan
from onellm_dist.modalities import all_modalities
from onellm_dist.model.lazy_weights import InitialWeights, open_model
from onellm_dist.model.recompute import enable_activation_checkpointing
from onellm_dist.train.callbacks.best_model import BEST, Best
from onellm_dist.train.callbacks.experts import RouterWatch
from onellm_dist.train.callbacks.grace_period import GracePeriodWatch, grace_period_seconds
from onellm_dist.train.callbacks.preemption import StopRequest
from onellm_dist.train.callbacks.profiler import Profiler
from onellm_dist.train.callbacks.sample_generation import SAMPLES, Answers
from onellm_dist.train.callbacks.startup_timing import Phases
from onellm_dist.train.callbacks.telemetry import Telemetry
from onellm_dist.train.callbacks.trackers import Trackers, check_trackers
from onellm_dist.train.callbacks.validation import VALIDATION, Validation
from onellm_dist.train.checkpoint.folder import get_steps_done, read_manifest
from onellm_dist.train.checkpoint.inherit import apply_resume
from onellm_dist.train.checkpoint.resume import ResumeTarget, find_checkpoint
from onellm_dist.train.checkpoint.source import describe_source
from onellm_dist.train.checkpoint.state import load_state
from onellm_dist.train.checkpoint.writer import Checkpoints
from onellm_dist.train.distributed import Distributed
from onellm_dist.train.engine.base import Engine
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.engine.settings import EngineSettings, make_settings
from onellm_dist.train.export import export_model
from onellm_dist.train.flops import FlopCounter, StepSize, peak_flops
from onellm_dist.train.heartbeat import InFlight
from onellm_dist.train.optim.optimizers import check_optim
from onellm_dist.train.optim.stages import (
    build_parameter_groups,
    find_copies,
    freeze_for_stage,
    map_parts,
)
from onellm_dist.train.records.exit_file import ExitFile
from onellm_dist.train.records.metrics import EVENTS, Events, Metrics, drop_from
from onellm_dist.train.records.run_directory import (
    CHECKPOINTS,
    LEDGER,
    lock_directory,
    prepare_directory,
)
from onellm_dist.train.records.skipped_samples import Ledger, write_stream
from onellm_dist.train.stability.checks import Guard
from onellm_dist.train.stability.rollback import Marks
from onellm_dist.train.totals import StepTotals

COMPARE_EVERY = 50
"""Steps between comparisons of the plan across ranks."""


@dataclass
class Run:
    """A run, ready to go. The loop uses it; nothing in it knows the loop."""

    config: RunConfig
    dist: Distributed
    plan: Plan
    engine: Engine
    loader: Loader
    ledger: Ledger
    marks: Marks
    guard: Guard
    checkpoints: Checkpoints
    metrics: Metrics
    events: Events
    stop: StopRequest
    exit_file: ExitFile
    first_step: int
    model: Any
    processor: Any
    flops: FlopCounter
    peak: float | None
    lock: IO[str] | None
    """Held by rank 0 while the process lives."""
    validation: Validation | None
    telemetry: Telemetry
    profiler: Profiler
    trackers: Trackers | None
    """Of rank 0."""
    phases: Phases
    """Of this start, until its first step is done."""
    open_loader: Callable[[int], Loader]
    open_metrics: Callable[[int], Metrics]
    best: Best

    @property
    def in_flight(self) -> InFlight:
        """What this rank is at."""
        return self.exit_file.in_flight

    def new_totals(self) -> StepTotals:
        """Empty sums for a step."""
        return StepTotals(sorted(set(self.plan.corpus.spans)), self.dist.device)

    def size_of(self, step: int) -> StepSize:
        """What all ranks do in a step, by the plan."""
        return self.flops.step(self.plan.step(step, self.dist.world_size))

    def compare_plans(self, step: int) -> None:
        """At the first step and now and then: every rank must have made the same plan.

        Raises:
            OneLLMError: they differ; without this the ranks would wait for each other in a collective.
        """
        if step != self.first_step and step % COMPARE_EVERY:
            return
        digests = self.dist.gather(self.plan.step(step, self.dist.world_size).digest())
        odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if odd:
            raise OneLLMError(
                f"step {step}: ranks {odd} have another plan than rank 0",
                "they would run different micro-batches and wait for each other for ever.",
                "make sure that all nodes see the same shards, length sidecars and version of onellm_dist.",
            )

    def restart_at(self, step: int, guard: Mapping[str, Any]) -> None:
        """Go on from `step`, a second time: loader, metrics and guard are set to it. Called by all ranks together."""
        self.first_step = step
        self.exit_file.step = step
        self.loader.close()
        self.loader = self.open_loader(step)
        self.metrics.close()
        self.metrics = self.open_metrics(step)
        self.guard.restore(guard)
        self.ledger.begin(step)
        if self.dist.is_rank_zero:
            for name in (VALIDATION, SAMPLES):
                drop_from(self.config.run.dir / name, step + 1)

    def stop_reason(self) -> str:
        """Who asked to stop, as far as any rank knows. Called by all ranks."""
        reasons = [reason for reason in self.dist.gather(self.stop.reason) if reason]
        return reasons[0] if reasons else "asked to stop"

    def show(self, name: str, text: str, step: int) -> None:
        """Show a text on the board."""
        self.metrics.text(name, text, step)

    def export(self) -> None:
        """Write the trained model to `<run.dir>/model`."""
        folder = self.config.run.dir / MODEL
        export_model(folder, self.engine, self.model, self.processor, self.dist)
        self.events.write("export", folder=str(folder), say=f"the trained model is in {folder}")

    def note_validation(self, done: int, loss: float) -> None:
        """Write the model to `<run.dir>/best` where its validation loss is the least so far. Called by all ranks with the same loss."""
        if self.best.note(done, loss):
            self.events.write("best", step=done, loss=loss, folder=str(self.config.run.dir / BEST))


def build_run(config: RunConfig, dist: Distributed, exit_file: ExitFile, phases: Phases) -> Run:
    """Build a run; called by all ranks together.

    Args:
        phases: what the start took so far; goes on here.

    Raises:
        UsageError: the recipe asks for something that is not there or cannot be.
    """
    settings = make_settings(config, world_size=dist.world_size, device=dist.device)
    check_optim(config.optim)
    check_trackers(config.track)
    lock = lock_directory(config.run.dir) if dist.is_rank_zero else None
    with phases.of("checkpoint"):
        found = find_checkpoint(config, config.run.dir / CHECKPOINTS, dist)
    resume, manifest = (
        found.folder,
        {} if found.folder is None else read_manifest(found.folder) or {},
    )
    stop = StopRequest(config.run.dir, exit_file, watch_file=dist.is_rank_zero)

    with phases.of("model"):
        model, processor, weights = open_model(
            path=config.model.path, preset=config.model.preset, seed=config.run.seed
        )
    with phases.of("data"):
        opening = (config.data, processor.tokenizer, config.run.seed, list(model.config.modalities))
        sizes = model.config.vision.patches, model.config.vision.prefix
        plan = _main_first(dist, partial(Plan.open, *opening, sizes=sizes))
        validation = (
            _main_first(dist, partial(open_validation_plan, *opening, sizes=sizes))
            if config.data.validation
            else None
        )
    new_phase = False if resume is None else _follow(plan, resume)
    events = _open_records(config, dist, plan, exit_file, found)
    if new_phase:
        _tell_segment(events, plan)
    flops = FlopCounter(
        model, plan.corpus, config.train.stage, encoder_trains=config.train.encoder == "trainable"
    )
    present = _prepare_model(config, model, weights, plan)
    router = RouterWatch(model, present)

    with phases.of("engine"):
        engine = _wrap(model, config, settings, weights)
    del weights
    with phases.of("checkpoint"):
        first_step = 0 if resume is None else _resume(resume, engine, dist, plan, events)
    ledger, marks, unreadable = _open_ledger(config, dist, first_step)
    steps = config.train.steps
    trackers = _trackers(config, dist, events)
    open_loader = partial(
        Loader, plan, dist.world_size, dist.rank, last_step=steps, skipped_samples=ledger.known
    )
    open_metrics = partial(_open_metrics, config, dist, trackers)
    guard = Guard(
        config.stability,
        config.data.max_skipped_samples,
        unreadable,
        {} if new_phase else manifest.get("guard", {}),
    )
    run = Run(
        config,
        dist,
        plan,
        engine,
        open_loader(first_step),
        ledger,
        marks,
        guard,
        Checkpoints(
            config.run.dir / CHECKPOINTS,
            engine,
            dist,
            config.checkpoint,
            partial(_about, config, plan, guard),
            partial(describe_source, config, manifest.get("frozen")),
            GracePeriodWatch(events.write, grace_period_seconds()),
        ),
        open_metrics(first_step),
        events,
        stop,
        exit_file,
        first_step,
        model,
        processor,
        flops,
        peak_flops(dist.device),
        lock,
        _validation(
            config, validation, engine, model, processor.tokenizer, dist, events, first_step
        ),
        Telemetry(config, dist, events, router),
        Profiler(config.track, config.run.dir, dist.device, events, main=dist.is_rank_zero),
        trackers,
        phases,
        open_loader,
        open_metrics,
        Best(
            config.run.dir / BEST,
            engine,
            model,
            processor,
            dist,
            validation.digest(0) if validation and dist.is_rank_zero else "",
        ),
    )
    if run.validation is not None:
        run.validation.show = run.show
    exit_file.step = first_step
    _tell_start(run, resume)
    return run


def _open_records(
    config: RunConfig, dist: Distributed, plan: Plan, exit_file: ExitFile, found: ResumeTarget
) -> Events:
    """From here on the run directory is this start's: its events, and what `exit.json` and the watchdog say of its samples."""
    if dist.is_rank_zero:
        prepare_directory(config, found.folder)
        apply_resume(config, found)
        repair_last_line(config.run.dir / EVENTS)
        write_stream(
            config.run.dir / LEDGER,
            plan.data_phases,
            {d.name: _absolute(d.location) for d in plan.corpus.datasets},
        )
    dist.barrier()
    events = Events(config.run.dir, main=dist.is_rank_zero)
    _tell_passed_over(events, found)
    exit_file.in_flight.names = lambda micro: plan.corpus.sample_ids(micro.samples)
    exit_file.in_flight.spans = plan.corpus.spans
    exit_file.in_flight.following = partial(_read_ahead, config, dist, plan)
    exit_file.on_failure = partial(_tell_failed, config.run.dir)
    return events


def _read_ahead(
    config: RunConfig, dist: Distributed, plan: Plan, micro: MicroBatch
) -> list[MicroBatch]:
    """What this rank's loader reads while the rank is at `micro`."""
    count = config.data.workers * config.data.prefetch
    later: list[MicroBatch] = []
    for step in range(micro.step, config.train.steps):
        if len(later) >= count:
            break
        later += [
            m
            for m in plan.step(step, dist.world_size).ranks[micro.rank]
            if (m.step, m.index) > (micro.step, micro.index)
        ]
    return later[:count]


def _open_ledger(
    config: RunConfig, dist: Distributed, first_step: int
) -> tuple[Ledger, Marks, int]:
    """The ledger, which knows the guard's marks too; the marks; and how many samples were not readable."""
    ledger, marks = (
        Ledger(config.run.dir / LEDGER, dist.rank),
        Marks(config.run.dir / LEDGER, main=dist.is_rank_zero),
    )
    unreadable = len(ledger.known.keys() - marks.known.keys())
    ledger.known.update(marks.known)
    ledger.begin(first_step)
    return ledger, marks, unreadable


def _prepare_model(config: RunConfig, model: Any, weights: InitialWeights, plan: Plan) -> set[str]:
    """Freeze what does not train, take image's parts over, set recomputation. Returns the mixture's modalities."""
    present = {name for spans in plan.corpus.spans for name in spans}
    freeze_for_stage(
        model, config.train.stage, present, encoder=config.train.encoder == "trainable"
    )
    if config.model.init_from_image:  # at a resume the checkpoint overwrites what trains; the copies that are frozen are not in it
        weights.copy(find_copies(model, next(iter(all_modalities())), config.model.init_from_image))
    enable_activation_checkpointing(model, config.train.activation_checkpointing)
    model.train()
    return present


def _wrap(
    model: torch.nn.Module, config: RunConfig, settings: EngineSettings, weights: InitialWeights
) -> Engine:
    groups = build_parameter_groups(model, config.optim.weight_decay)
    engine = get_engine(config.engine.name).load()
    return engine.wrap(model, groups, replace(settings, parts=map_parts(model)), weights)


def _validation(
    config: RunConfig,
    plan: Plan | None,
    engine: Engine,
    model: Any,
    tokenizer: Any,
    dist: Distributed,
    events: Events,
    first_step: int,
) -> Validation | None:
    wanted = config.data.validation
    if plan is None or wanted is None:
        return None
    asked = (
        Answers(wanted, plan, engine, tokenizer, dist, config.run.dir, first_step=first_step)
        if wanted.generate
        else None
    )
    return Validation(
        wanted,
        plan,
        engine,
        model,
        dist,
        config.run.dir,
        events,
        first_step=first_step,
        steps=config.train.steps,
        answers=asked,
    )


def _trackers(config: RunConfig, dist: Distributed, events: Events) -> Trackers | None:
    if not (dist.is_rank_zero and config.track.trackers):
        return None
    return Trackers(
        config.track, config.run.dir, config.model_dump(mode="json", by_alias=True), events
    )


def _main_first(dist: Distributed, open_plan: Callable[..., Plan]) -> Plan:
    """Rank 0 measures text lengths that nobody measured; the others wait for it."""
    problem: OneLLMError | None = None
    plan: Plan | None = None
    if dist.is_rank_zero:
        try:
            plan = open_plan()
        except OneLLMError as error:
            problem = error
    problem = dist.broadcast(problem)
    if problem is not None:
        raise problem
    return plan or open_plan(build_counts=False)


def _follow(plan: Plan, resume: Path) -> bool:
    """Go on with the stream of a checkpoint; whether a new data_phase of it begins. Every rank reads the same manifest."""
    manifest = read_manifest(resume) or {}
    return plan.follow(
        [DataPhase.from_json(raw) for raw in manifest.get("data_phases", ())],
        get_steps_done(manifest),
    )


def _open_metrics(
    config: RunConfig, dist: Distributed, trackers: Trackers | None, first_step: int
) -> Metrics:
    track = config.train
    return Metrics(
        config.run.dir,
        main=dist.is_rank_zero,
        first_step=first_step,
        steps=track.steps,
        log_every=track.log_every,
        trackers=trackers,
    )


def _about(config: RunConfig, plan: Plan, guard: Guard, step: int) -> dict[str, Any]:
    """What a checkpoint's manifest says beside the state."""
    return {
        "stage": config.train.stage,
        "plan": plan.fingerprint(),
        "onellm_dist": __version__,
        "model": config.model.model_dump(mode="json"),
        "seed": config.run.seed,
        "data_phases": [data_phase.to_json() for data_phase in plan.data_phases],
        "guard": guard.state(),
    }


def _tell_passed_over(events: Events, found: ResumeTarget) -> None:
    for name, problem in found.damaged:
        events.write(
            "checkpoint_damaged",
            folder=name,
            problems=[problem],
            resumed=found.folder.name if found.folder else None,
            say=f"WARNING: checkpoint {name} is damaged and passed over: {problem}",
        )


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).resolve())


def _tell_segment(events: Events, plan: Plan) -> None:
    data_phase = plan.data_phases[-1]
    shares = ", ".join(
        f"{name} {count / sum(data_phase.counts.values()):.4f}"
        for name, count in data_phase.counts.items()
    )
    events.write(
        "data_phase",
        step=data_phase.start,
        counts=dict(data_phase.counts),
        global_batch=data_phase.global_batch,
        say=f"data_phase {len(plan.data_phases)} of the plan begins at step {data_phase.start}: {shares}",
    )


def _resume(folder: Path, engine: Engine, dist: Distributed, plan: Plan, events: Events) -> int:
    manifest = load_state(folder, engine, dist)
    if (
        "data_phases" not in manifest and manifest["plan"] != plan.fingerprint()
    ):  # written before 0.2, when nothing was refused
        events.write(
            "plan_changed",
            step=get_steps_done(manifest),
            checkpoint=folder.name,
            say=f"WARNING: mixture, shards, seed or batch are not those of {folder}: other samples come from step {get_steps_done(manifest)} on",
        )
    return get_steps_done(manifest)


def _tell_start(run: Run, resume: Path | None) -> None:
    trained = sum(run.engine.numel(p) for p in run.model.parameters() if p.requires_grad)
    origin = f"resumes {resume.name} (step {run.first_step})" if resume else "starts at step 0"
    run.events.write(
        "start",
        world=run.dist.world_size,
        device=str(run.dist.device),
        first_step=run.first_step,
        resumed=str(resume) if resume else None,
        lost_steps=run.metrics.lost_steps,
        lost_seconds=round(run.metrics.lost_seconds, 3),
        mfu=run.flops.describe(run.dist.world_size, run.peak),
        trainable=trained,
        threads=torch.get_num_threads(),
        onellm_dist=__version__,
        nodes=run.dist.world_size // run.dist.local_world_size,
        grace_period_seconds=grace_period_seconds(),
        **_slurm(os.environ),
        say=f"{run.config.train.stage}: {trained:,} trainable parameters, {run.dist.world_size} ranks on {run.dist.device.type}, "
        f"{origin} of {run.config.train.steps}\n{run.flops.describe(run.dist.world_size, run.peak)}",
    )


def _slurm(env: Mapping[str, str]) -> dict[str, Any]:
    """What Slurm says of the job that this start is in; nothing outside one."""
    if "SLURM_JOB_ID" not in env:
        return {}
    nodes = env.get("SLURM_JOB_NUM_NODES") or env.get("SLURM_NNODES")
    return {
        "slurm_job_id": env["SLURM_JOB_ID"],
        "slurm_restart_count": int(env.get("SLURM_RESTART_COUNT") or 0),
        "slurm_nodes": int(nodes) if nodes else None,
        "slurm_node_list": env.get("SLURM_JOB_NODELIST"),
    }


def _tell_failed(run_dir: Path, found: dict[str, Any]) -> None:
    """The event `end` of a start that failed, written by the rank whose failure came first."""
    fields = {key: value for key, value in found.items() if key != "time"}
    Events(run_dir, main=True).write("end", **fields)
