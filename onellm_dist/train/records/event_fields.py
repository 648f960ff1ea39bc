"""Every event of `events.jsonl`, with when it is written and its fields, for the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class EventDescription:
    """What one event says."""

    when: str
    """When the event is written."""
    fields: tuple[str, ...] = ()
    """Fields of the event, beside `time` and `event`."""


_ANOMALY = ("step", "reason", "anomaly", "offending_samples", "offending_samples_total")

EVENT_FIELDS: Mapping[str, EventDescription] = {
    "start": EventDescription(
        "The run is built, and its first step is about to begin. `frozen` is `engine.frozen`; "
        "where the recipe leaves it open, `frozen_reason` says why this start decided so. It is "
        "still `auto` where the engine leaves no choice.",
        (
            "world_size",
            "device",
            "device_name",
            "first_step",
            "resumed",
            "lost_steps",
            "lost_seconds",
            "mfu",
            "trainable",
            "parameters",
            "length",
            "frozen",
            "frozen_reason",
            "kernels",
            "threads",
            "onellm_dist",
            "nodes",
            "grace_period_seconds",
            "slurm_job_id",
            "slurm_restart_count",
            "slurm_nodes",
            "slurm_node_list",
        ),
    ),
    "startup_timing": EventDescription(
        "The first step is done; one event for each part of the start-up: `imports`, "
        "`process_group`, `model`, `engine`, `checkpoint`, `data`, `first_step`.",
        ("name", "seconds"),
    ),
    "config_changed": EventDescription(
        "A resume changed keys of the recipe; `config_history.jsonl` has the same.",
        ("step", "changes"),
    ),
    "learning_rate_jump": EventDescription(
        "At a resume, learning rates differ from those the previous recipe gave. `old` and `new` "
        "are those of the `parameter` that jumps most, of as many as `parameters`.",
        ("step", "old", "new", "parameter", "parameters"),
    ),
    "straggler": EventDescription(
        "Ranks keep the others waiting: `seconds` of a step beyond the median of the other ranks, "
        "over up to 32 steps. `kind` says with what: `data` (their loader), `compute` (their "
        "forward) or `host` (Python between the passes). `node` is where they run.",
        ("step", "kind", "ranks", "node", "seconds", "share"),
    ),
    "exclusions": EventDescription(
        "Lists of excluded samples were read. `other_datasets` counts the entries of datasets that "
        "the run does not read; `unmatched` entries name nothing that it reads.",
        ("entries", "other_datasets", "unmatched"),
    ),
    "pack_budget": EventDescription(
        "The planner found the token budgets (`data.pack_*_tokens: auto`); `lowered` counts the "
        "times that an out-of-memory has lowered them since.",
        (
            "llm_tokens",
            "encoder_tokens",
            "planned_llm_tokens",
            "planned_encoder_tokens",
            "lowered",
        ),
    ),
    "budget_lowered": EventDescription(
        "The start before ran out of memory in a step, and this one has smaller token budgets.",
        (
            "step",
            "rank",
            "ranks",
            "llm_tokens",
            "encoder_tokens",
            "old_llm_tokens",
            "old_encoder_tokens",
            "reason",
        ),
    ),
    "data_phase": EventDescription("A data phase begins.", ("step", "counts", "global_batch")),
    "plan_changed": EventDescription(
        "The resumed checkpoint has no data phases and was written with other data.",
        ("step", "checkpoint"),
    ),
    "skipped_samples": EventDescription(
        "Samples of a step could not be read.", ("step", "count", "total")
    ),
    "step_skipped": EventDescription(
        "A step was skipped on all ranks.", (*_ANOMALY, "micro_batches")
    ),
    "rollback": EventDescription(
        "The run returned to a checkpoint, without the offending samples.",
        (*_ANOMALY, "first_step", "lost_steps", "lost_seconds", "excluded", "number"),
    ),
    "stability_stop": EventDescription("`stability.policy=stop` ended the run.", _ANOMALY),
    "checkpoint": EventDescription(
        "A checkpoint is complete.", ("steps_done", "folder", "bytes", "seconds", "stall_seconds")
    ),
    "checkpoint_damaged": EventDescription(
        "A damaged checkpoint was found, and an earlier one is used.",
        ("folder", "problems", "resumed"),
    ),
    "grace_period_short": EventDescription(
        "A checkpoint took longer than the job's grace period.",
        ("steps_done", "seconds", "grace_period_seconds"),
    ),
    "validation": EventDescription("The validation set was run.", ("steps_done", "loss")),
    "best_model": EventDescription(
        "The validation loss is the lowest so far, and the weights are in `best/`.",
        ("steps_done", "loss", "folder"),
    ),
    "expert_underused": EventDescription(
        "No modality gave an expert a sizeable weight for a long time.",
        ("step", "expert", "load"),
    ),
    "profile": EventDescription("A trace was written.", ("first", "last", "files")),
    "tracker_dropped": EventDescription(
        "A tracker failed and is no longer used.", ("tracker", "call", "problem")
    ),
    "export": EventDescription(
        "The trained model was written; `adapter` is the folder of its adapters alone. Where they "
        "are not written alone, `alone` says why; `rounding` says over which rounded weights the "
        "run trained.",
        ("folder", "adapter", "alone", "rounding"),
    ),
    "end": EventDescription(
        "The start ended. After a failure it also has the other fields of `exit.json`.",
        ("status", "steps_done", "reason"),
    ),
}
