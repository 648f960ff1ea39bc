"""`onellm evaluate --group`: the ranks of a group join, and load the model as shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from onellm_dist.common.counts import format_count
from onellm_dist.common.errors import UsageError

if TYPE_CHECKING:
    from onellm_dist.evaluation.evaluate import EvaluationOptions
    from onellm_dist.launch.ranks import Ranks
    from onellm_dist.model.adapters.adapter_set import NamedAdapter

ENGINE = "fsdp"


def check_group(size: int, model: Path, adapters: Sequence[NamedAdapter], ranks: int) -> None:
    """Check that some ranks can hold a model in groups.

    Args:
        size: ranks of a group.
        model: the model's folder.
        adapters: adapters of the model.
        ranks: number of all ranks.

    Raises:
        UsageError: they cannot be split so, or there is an adapter.
    """
    if size == 1:
        return
    from onellm_dist.model.adapters.folder import is_adapter

    if ranks % size:
        raise UsageError(
            f"--group {size} with {format_count(ranks, 'rank')}",
            "each group holds one model, and every rank is in one.",
            f"start a multiple of {size} ranks (--ranks, or a launcher's number of processes).",
        )
    if adapters or is_adapter(model):
        raise UsageError(
            f"--group with the adapter {adapters[0].folder if adapters else model}",
            "the weights of a whole model are shared out.",
            "merge it into its base first: onellm convert adapter ADAPTER MERGED.",
        )


def evaluate_in_group(
    folder: Path,
    tasks: Sequence[str],
    data: Path,
    out: Path,
    options: EvaluationOptions,
    ranks: Ranks,
    size: int,
) -> str:
    """Answer this group's questions with a saved model, and say what was done in one line.

    Args:
        folder: the model's folder.
        tasks: names of tasks.
        data: folder of their datasets.
        out: the output folder.
        options: how they are asked.
        ranks: this process's place among all ranks.
        size: ranks of a group.

    Raises:
        StoppedError: the evaluation was asked to stop.
        UsageError: as of `evaluate_model`, or there is no model.
        OneLLMError: another rank of the group failed or is gone.
    """
    from onellm_dist.evaluation.evaluate_group import answer_as_group
    from onellm_dist.evaluation.loading import choose_dtype, identify_model
    from onellm_dist.evaluation.stop_request import StopRequest
    from onellm_dist.model.weights.lazy import open_model
    from onellm_dist.train.engine.select import get_engine
    from onellm_dist.train.rank_group import join_group

    load = get_engine(ENGINE).load_sharded_model()
    assert load is not None
    stop = StopRequest(out)  # before the model is loaded, which takes minutes
    group, member = divmod(ranks.rank, size)
    options = replace(options, rank=group, world_size=ranks.world_size // size)
    with join_group(ranks, size, out) as joined:
        empty, processor, weights = open_model(path=folder, preset=None, seed=0)
        sharded = load(empty, weights, joined.device, choose_dtype())
        said = answer_as_group(
            sharded.model,
            processor.tokenizer,
            sharded.run,
            tasks,
            data,
            out,
            options,
            identity=identify_model(folder),
            stop=stop,
        )
        held, whole = sharded.count_weights()
    return (
        f"rank {ranks.rank} ({member} of group {group}): {said}; "
        f"holds {held:,} of {whole:,} weights"
    )
