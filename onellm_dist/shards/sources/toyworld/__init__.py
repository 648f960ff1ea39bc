"""The toy world: shards that anyone can make in a minute and that a small model can really learn (DESIGN 5b)."""

from __future__ import annotations

from pathlib import Path

from onellm_dist.common.errors import UsageError
from onellm_dist.shards.sources.base import BuildReport, Option, Source
from onellm_dist.shards.sources.toyworld.render import ToySample, render_sample
from onellm_dist.shards.sources.toyworld.world import MODALITIES

__all__ = ["SOURCE", "ToySample", "render_sample"]


def _build(
    inputs: Path | None,
    out: Path,
    *,
    workers: int,
    seed: int,
    train: str,
    test: str,
    modalities: str,
) -> BuildReport:
    # Not imported above: a worker that only renders starts in a fraction of the time without torch.
    from onellm_dist.shards.sources.toyworld.build import build_toyworld

    chosen = tuple(modalities.split(",")) if modalities else MODALITIES
    return build_toyworld(
        out,
        seed=seed,
        train_per_modality=_counts("train", train),
        test_per_modality=_counts("test", test),
        modalities=chosen,
        workers=workers,
    )


def _counts(option: str, text: str) -> int | dict[str, int]:
    """`2000`, or `image=6000,audio=1500` (2000 or 120 for those not named).

    Raises:
        UsageError: neither of these.
    """
    try:
        if "=" not in text:
            return int(text)
        return {
            name: int(count) for name, _, count in (item.partition("=") for item in text.split(","))
        }
    except ValueError:
        raise UsageError(
            f"option {option}={text!r} is neither a number nor modality=number,...",
            "the samples to render are not known.",
            f"write {option}=2000, or {option}=image=6000,audio=1500.",
        ) from None


SOURCE = Source(
    name="toyworld",
    summary="generated scenes and events of eight modalities, one dataset each",
    build=_build,
    options={
        "train": Option(
            "2000",
            "training samples a modality: a number, or image=6000,audio=1500 (2000 for the others)",
        ),
        "test": Option(
            "120",
            "samples of each of the two test splits: a number, or modality=number,... (120 for the others)",
        ),
        "modalities": Option("", "comma-separated names; all eight where empty"),
    },
    needs_input=False,
)
