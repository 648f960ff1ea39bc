"""What a user asks the builder for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from onellm_dist.shards.build.plan import make_request_json, to_json_options
from onellm_dist.shards.build.settings import BuildSettings
from onellm_dist.shards.build.workers import ArrayTask
from onellm_dist.shards.sources.base import Source
from onellm_dist.shards.storage.paths import StoragePath


@dataclass(frozen=True)
class BuildRequest:
    """What is built, from what, and where."""

    source: Source
    inputs: StoragePath
    out: StoragePath
    seed: int
    options: Mapping[str, Any]
    """The source's own options, complete."""
    settings: BuildSettings

    def to_json(self) -> dict[str, Any]:
        """Return what determines the samples, as `BuildPlan.get_request` does."""
        return make_request_json(
            self.source.name,
            str(self.inputs),
            self.seed,
            to_json_options(self.options),
            self.settings,
            self.settings.denylist_sha256(),
        )


@dataclass(frozen=True)
class BuildMode:
    """How this process carries a request out."""

    workers: int
    overwrite: bool
    restart: bool
    task: ArrayTask
    manifest_before: object
    """The identity of the manifest that was at the output when this process began."""
