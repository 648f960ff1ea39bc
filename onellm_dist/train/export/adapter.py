"""The trained adapters as a folder of PEFT: `<run.dir>/adapter`, beside the merged model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from onellm_dist.common.checksums import write_sums
from onellm_dist.common.counts import format_count
from onellm_dist.common.files import replace_folder, sha256_file, sync
from onellm_dist.config.schema import RunConfig
from onellm_dist.config.train_sections import LoraSection
from onellm_dist.model.adapters.folder import WEIGHTS, write_adapter
from onellm_dist.model.adapters.lora import PATTERN
from onellm_dist.model.spans.positions import read_span_positions
from onellm_dist.train.distributed import Distributed


@dataclass(frozen=True)
class AdapterTarget:
    """Where adapters are written, and what belongs to them."""

    folder: Path
    section: LoraSection
    describe_base: Callable[[], Mapping[str, Any]]
    """Says what the adapters were trained over; rank 0 asks."""

    def write(
        self, tensors: Mapping[str, torch.Tensor], write_configs: Callable[[Path], None]
    ) -> None:
        """Write the folder, or nothing at all. Rank 0 calls it.

        Args:
            tensors: the adapters, by the names of their parameters in the model.
            write_configs: writes config, processor and model card into a folder.

        Raises:
            OSError: the disk refuses.
        """
        partial = self.folder.with_name(f".{self.folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_configs(partial)
        write_adapter(partial, tensors, self.section, self.describe_base())
        write_sums(partial, {WEIGHTS: sha256_file(partial / WEIGHTS)})
        for path in partial.iterdir():
            sync(path)
        replace_folder(partial, self.folder)


def plan_adapter(
    config: RunConfig,
    model: nn.Module,
    folder: Path,
    describe_base: Callable[[], Mapping[str, Any]],
    dist: Distributed,
) -> tuple[AdapterTarget | None, str]:
    """Plan the folder of the adapters. All ranks call it together.

    Args:
        config: the recipe.
        model: the model inside the engine.
        folder: the folder.
        describe_base: see `AdapterTarget`.
        dist: the ranks.

    Returns:
        (the target, ""); or (None, why the adapters alone are not what was trained); or (None, "")
        for a run without adapters.
    """
    section = config.train.lora
    if section is None:
        return None, ""
    mark = PATTERN.strip("*")
    others = [n for n, p in model.named_parameters() if p.requires_grad and mark not in n]
    if others:
        return (
            None,
            f"{format_count(len(others), 'parameter')} beside the adapters trained, such as "
            f"{others[0]}",
        )
    if config.model.init_from_image:
        return None, "model.init_from_image changed the model that they were trained over"
    kind, path = config.model.span_positions, config.model.path
    if kind is not None and kind != dist.ask_rank_zero(lambda: read_span_positions(path)):
        return None, "model.span_positions changed the model that they were trained over"
    return AdapterTarget(folder, section, describe_base), ""
