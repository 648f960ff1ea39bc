"""The toy world: shards that anyone can make in a minute and that a small model really learns."""

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
    # Imported here: a worker that only renders starts much faster without torch.
    from onellm_dist.shards.sources.toyworld.build import build_toyworld

    chosen = tuple(modalities.split(",")) if modalities else MODALITIES
    return build_toyworld(
        out,
        seed=seed,
        train_per_modality=_parse_counts("train", train),
        test_per_modality=_parse_counts("test", test),
        modalities=chosen,
        workers=workers,
    )


def _parse_counts(option: str, text: str) -> int | dict[str, int]:
    """Parse `2000`, or `image=6000,audio=1500` (2000 or 120 for modalities that are not named).

    Raises:
        UsageError: the text is neither.
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
            "it says how many samples are rendered.",
            f"write {option}=2000, or {option}=image=6000,audio=1500.",
        ) from None


SOURCE = Source(
    name="toyworld",
    summary="generated scenes and events of eight modalities, one dataset each",
    build=_build,
    options={
        "train": Option(
            "2000",
            "training samples per modality: a number, or image=6000,audio=1500 (others: 2000)",
        ),
        "test": Option(
            "120",
            "samples of each of the two test splits: a number, "
            "or modality=number,... (others: 120)",
        ),
        "modalities": Option("", "names separated by commas; default: all eight"),
    },
    needs_input=False,
)
