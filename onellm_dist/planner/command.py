"""`onellm plan`: predicts what a run needs and how long it takes, before it is queued."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED, UsageError
from onellm_dist.common.files import write_atomic
from onellm_dist.common.output import write_output
from onellm_dist.common.resources import recipes_dir
from onellm_dist.config.load import load_config
from onellm_dist.config.recipe_files import find_recipe
from onellm_dist.config.schema import RunConfig
from onellm_dist.config.yaml_text import dump_yaml
from onellm_dist.data.epochs import resolve_epochs
from onellm_dist.data.packing import TokenBudget
from onellm_dist.data.token_budget import UNLIMITED, read_budget, set_budget
from onellm_dist.modalities import all_modalities
from onellm_dist.planner.frozen import decide_placement
from onellm_dist.planner.hardware import find_gpus_here, get_gpu_kind
from onellm_dist.planner.memory import MemoryPlan
from onellm_dist.planner.run_plan import Planner, get_modalities, load_model_config
from onellm_dist.planner.search import search_budget, search_recipe
from onellm_dist.planner.show import format_gb, format_plan, make_json
from onellm_dist.planner.time import GpuCluster
from onellm_dist.planner.workload import describe_data
from onellm_dist.train.engine.frozen import can_shard_instead
from onellm_dist.train.engine.select import get_engine
from onellm_dist.train.start.recipe_check import find_shape_problems

FOUND_BUDGETS = "token budgets"
"""First words of the note on budgets that were found."""


@dataclass(frozen=True)
class PlanOptions:
    """What the command line says beside the recipe."""

    nodes: int = 1
    gpus_per_node: int | None = None
    """Default: 8, or with `here` the GPUs of this machine."""
    gpu: str | None = None
    here: bool = False
    network_gb_s: float | None = None
    text_tokens: int | None = None
    modalities: tuple[str, ...] = ()
    """`DATASET=MODALITY+MODALITY` each."""
    as_json: bool = False
    search: bool = False
    write: Path | None = None
    """File for the recipe that the search finds."""


def make_planner(recipe: Path | str, overrides: Sequence[str], options: PlanOptions) -> Planner:
    """The planner of a recipe; unless it searches, with `engine.frozen` as a start would decide.

    Raises:
        UsageError: the recipe or an option is wrong, or something that is needed is not known.
    """
    make_cluster(options)  # what the options lack is said before what the recipe lacks
    planner = make_config_planner(load_planned_config(recipe, overrides), options)
    placement = None if options.search else decide_placement(planner, planner.config)
    if placement is not None:
        planner.config = placement.config
        planner.data = replace(planner.data, notes=(*planner.data.notes, placement.describe()))
    return planner


def make_config_planner(config: RunConfig, options: PlanOptions) -> Planner:
    """The planner of a recipe that was read already.

    Args:
        config: the recipe, with its length in steps.
        options: what else is said.

    Raises:
        UsageError: an option is wrong, or something that is needed is not known.
    """
    known = parse_modalities(options.modalities)
    cluster = make_cluster(options)
    get_engine(config.engine.name).read_options(config.engine, world_size=cluster.world_size)
    modalities = get_modalities(load_model_config(config))
    data = describe_data(config.data, modalities, text_tokens=options.text_tokens, known=known)
    if not config.data.finds_budgets:
        return Planner(config, cluster, data)
    planner = Planner(with_budget(config, UNLIMITED), cluster, data)
    budget = search_budget(planner)
    planner.config = with_budget(config, budget)
    note = (
        f"{FOUND_BUDGETS} of {budget.llm} and {budget.encoder}, as a start would find them (auto)"
    )
    planner.data = replace(data, notes=(*data.notes, note))
    return planner


def with_budget(config: RunConfig, budget: TokenBudget) -> RunConfig:
    """A recipe with these token budgets."""
    return config.model_copy(update={"data": set_budget(config.data, budget)})


def run_plan(recipe: Path | str, overrides: Sequence[str], options: PlanOptions) -> int:
    """Print the plan of a recipe.

    Returns:
        The exit code: failed if the run would not fit.

    Raises:
        UsageError: the recipe or an option is wrong, or something that is needed is not known.
    """
    if options.write is not None:
        check_target(options)
    planner = make_planner(recipe, overrides, options)
    found = search_recipe(planner) if options.search else None
    config = planner.config if found is None else found.config
    notes = [*planner.data.notes]
    if (placement := decide_placement(planner, config)) is not None:
        config = placement.config
        notes.append(placement.describe())
    plan = planner.plan(config)
    untimed = get_engine(config.engine.name).find_untimed(config.engine)
    if untimed is not None:
        notes.append(f"nothing for {untimed}; --search leaves such engines out")
    if options.as_json:
        content = make_json(plan, config, planner.cluster, notes)
        if found is not None:
            content["search"] = {
                "combinations": found.combinations,
                "overrides": list(found.overrides),
                "step_seconds_before": _compute_time_before(planner),
            }
        write_output(json.dumps(content, indent=2))
    else:
        if found is not None:
            write_output(f"the fastest of {found.combinations} combinations that fits:")
            write_output(" ".join(found.overrides) or "the recipe as it is")
        write_output("\n".join(format_plan(plan, config, planner.cluster, notes)))
        if not plan.memory.fits:
            write_output("\n".join(explain_shortage(plan.memory, config)))
    if options.write is not None and found is not None:
        write_recipe(options.write, recipe, found.config)  # `auto` stays what each start decides
    return EXIT_DONE if plan.memory.fits else EXIT_FAILED


def _compute_time_before(planner: Planner) -> float | None:
    """Seconds of a step of the recipe that a search began with; None: its packs are too small."""
    config = planner.config
    if planner.find_too_large(config) is not None:
        return None
    placement = decide_placement(planner, config)
    return planner.compute_time(config if placement is None else placement.config).total


def check_target(options: PlanOptions) -> None:
    """Check that a found recipe can be written.

    Raises:
        UsageError: nothing is searched, or the file exists.
    """
    if not options.search:
        raise UsageError(
            "--write needs --search",
            "without a search the recipe is what it was.",
            "add --search.",
        )
    if options.write is not None and options.write.exists():
        raise UsageError(
            f"--write {options.write}: the file exists",
            "a recipe that somebody wrote would be lost.",
            "choose another name, or remove it.",
        )


def write_recipe(path: Path, recipe: Path | str, config: RunConfig) -> None:
    """Write what a recipe found by search changes, as a recipe on the one that it began with.

    Raises:
        UsageError: the recipe is not valid without the overrides of the command line.
    """
    base = find_recipe(recipe)
    if base.is_relative_to(recipes_dir()):
        name = base.relative_to(recipes_dir()).with_suffix("").as_posix()
    else:
        name = os.path.relpath(base, path.parent)
    values: dict[str, Any] = {"base": name}
    before, after = (c.model_dump(mode="json", by_alias=True) for c in (load_config(base), config))
    for section, keys in after.items():
        changed = {k: v for k, v in keys.items() if v != before[section][k]}
        if changed:
            values[section] = changed
    write_atomic(path, dump_yaml(values))


def load_planned_config(recipe: Path | str, overrides: Sequence[str]) -> RunConfig:
    """The recipe; a model folder that is missing is explained, data may be missing.

    Raises:
        UsageError: the recipe is wrong; all problems are listed.
    """
    try:
        return resolve_epochs(load_config(recipe, overrides, find_problems=find_shape_problems))
    except UsageError as error:
        if "model.path=" not in error.what:
            raise
        raise UsageError(
            error.what,
            "a plan needs the model's config.json, and none of its weights.",
            "copy config.json and tokenizer files there, or plan with the shapes of a preset: "
            "add model.preset=onellm-7b.",
        ) from None


def make_cluster(options: PlanOptions) -> GpuCluster:
    """The machine that the options describe.

    Raises:
        UsageError: both or neither of `gpu` and `here`, or an unknown GPU.
    """
    if (options.gpu is None) == (not options.here):
        raise UsageError(
            "give exactly one of --gpu and --here",
            "memory and speed depend on the GPU.",
            "name one, such as --gpu h100, or use --here on the machine itself.",
        )
    gpu, count = find_gpus_here() if options.here else (get_gpu_kind(str(options.gpu)), 8)
    if gpu.shared:
        count = 1
    gpu = gpu.divide(options.gpus_per_node or count)
    return GpuCluster(
        gpu=gpu,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node or count,
        network_gb_s=options.network_gb_s or gpu.node_network_gb_s,
    )


def parse_modalities(items: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
    """`DATASET=MODALITY+MODALITY` items as a mapping.

    Raises:
        UsageError: an item has another form, or names a modality that does not exist.
    """
    found = {}
    for item in items:
        name, sep, text = item.partition("=")
        spans = tuple(filter(None, text.split("+")))
        unknown = [x for x in spans if x not in all_modalities()]
        if not sep or not name or unknown:
            raise UsageError(
                f"--modalities {item}: "
                + (f"no modality {', '.join(unknown)}" if unknown else "not DATASET=MODALITY"),
                "what a sample costs depends on its modalities.",
                f"write DATASET=MODALITY, with + between several; "
                f"there are {', '.join(all_modalities())}.",
            )
        found[name] = spans
    return found


def explain_shortage(memory: MemoryPlan, config: RunConfig) -> list[str]:
    """What a run that does not fit would need."""
    missing = memory.total - memory.capacity
    fixed = memory.total - sum(memory.activations.values()) - memory.working - memory.inputs
    lines = ["", f"does not fit: {format_gb(missing)} too much on each device"]
    if can_shard_instead(config.engine, bf16=config.train.precision == "bf16"):
        lines.append("engine.frozen=sharded frees what frozen weights take on every rank")
    if fixed > memory.capacity:
        lines.append(
            f"weights, optimizer and buffers alone take {format_gb(fixed)}: more GPUs, or an "
            "engine that shards more, are needed (docs/howto/engines.md)"
        )
        return lines
    room = memory.capacity - fixed
    share = room / max(1.0, memory.total - fixed)
    budget = read_budget(config.data)
    lines.append(
        f"activations may take {format_gb(room)}: budgets of about "
        f"data.pack_llm_tokens={int(budget.llm * share)} "
        f"data.pack_encoder_tokens={int(budget.encoder * share)}, "
        "and no less than the longest sample has"
    )
    if config.train.activation_checkpointing != "full":
        lines.append("or more recomputation: train.activation_checkpointing=selective, then full")
    return lines
