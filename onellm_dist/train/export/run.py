"""What a finished run leaves: `<run.dir>/model`, and `<run.dir>/adapter` where it trained one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from onellm_dist.common.run_files import ADAPTER, MODEL
from onellm_dist.model.adapters.folder import describe_rounding
from onellm_dist.train.checkpoint.source import describe_source
from onellm_dist.train.export.adapter import plan_adapter
from onellm_dist.train.export.model import export_model
from onellm_dist.train.records.run_directory import move_aside

if TYPE_CHECKING:
    from onellm_dist.train.trainer import Trainer


def export_run(trainer: Trainer) -> None:
    """Write the trained model. All ranks call it together.

    Args:
        trainer: the trainer; all its steps are done.

    Raises:
        OneLLMError: rank 0 could not write; every rank raises.
    """
    config = trainer.config
    folder, beside = config.run.dir / MODEL, config.run.dir / ADAPTER
    adapter, reason = plan_adapter(
        config, trainer.model, beside, partial(describe_source, config), trainer.dist
    )
    rounding = describe_rounding(config.engine.frozen_weights)
    export_model(
        folder,
        trainer.engine,
        trainer.model,
        trainer.processor,
        trainer.dist,
        notes={
            "stage": config.train.stage,
            "steps done": trainer.state.steps_done,
            **({"rounding": rounding} if rounding else {}),
        },
        adapter=adapter,
    )
    if adapter is None and beside.exists() and trainer.dist.is_rank_zero:
        # Of an earlier end of the run, before other parameters trained too.
        move_aside(config.run.dir, [beside])
    lines = [f"the trained model is in {folder}"]
    fields: dict[str, Any] = {}
    if adapter is not None:
        fields["adapter"] = str(beside)
        lines.append(f"its adapters alone are in {beside}")
    elif reason:
        fields["alone"] = reason
        lines.append(f"adapters are merged into it, and not written alone: {reason}")
    if rounding:
        fields["rounding"] = rounding
        lines.append(rounding)
    trainer.events.write("export", folder=str(folder), message="\n".join(lines), **fields)
