"""Where a build reads and decodes its samples: in worker processes that a sample cannot harm.

A sample that hangs, crashes or needs too much memory ends its worker, and is tried once more in a
fresh one. If that ends the same way, it is a bad sample like any other, with its reason.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable

from onellm_dist.common.workers.samples import SampleFunction, SampleLimits, SamplePool
from onellm_dist.common.workers.words import PoolWords
from onellm_dist.shards.build.plan import BuildPlan
from onellm_dist.shards.build.prepare import PreparedSample, prepare_sample
from onellm_dist.shards.build.registry import get_source
from onellm_dist.shards.sources.base import RawSample

BUILDER = PoolWords(
    worker="builder worker",
    result="samples",
    parent="builder",
    seconds="sample_seconds",
    megabytes="sample_mb",
    fewer="use fewer processes (--workers)",
)
_CHUNK = 8
"""Raw samples that each of several workers receives at once. A single one receives one: it serves
one of several builders, and a chunk of long films from each would fill the memory."""


class Preparation:
    """Prepares the raw samples of a build, in order; use it as a context manager.

    Args:
        plan: the plan of the build.
        workers: processes that prepare. They are not used if nothing is decoded.
    """

    def __init__(self, plan: BuildPlan, *, workers: int) -> None:
        self._plan = plan
        settings = plan.settings
        self._pool = SamplePool(
            SampleFunction(self._prepare_one, _refuse, lambda raw_sample: raw_sample.key),
            BUILDER,
            SampleLimits(settings.sample_seconds, settings.sample_mb),
            workers=workers,
            chunk=_CHUNK if workers > 1 else 1,
        )
        as_stored = get_source(plan.source).reads_as_stored
        self._here = workers == 1 and as_stored and not settings.decodes

    def prepare(self, raw_samples: Iterable[RawSample]) -> Generator[PreparedSample]:
        """Yield the raw samples, prepared.

        Raises:
            OneLLMError: as of `prepare_sample`.
            MachineError: as of `SamplePool.map`.
        """
        if self._here:
            yield from map(self._prepare_one, raw_samples)
        else:
            yield from self._pool.map(raw_samples)

    def __enter__(self) -> Preparation:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()

    def _prepare_one(self, raw_sample: RawSample) -> PreparedSample:
        return prepare_sample(
            raw_sample,
            self._plan.modalities,
            self._plan.settings,
            lists_media=self._plan.lists_media,
        )


def _refuse(raw_sample: RawSample, reason: str) -> PreparedSample:
    return PreparedSample(raw_sample.key, raw_sample.where, reason=f"decoder failed: {reason}")
