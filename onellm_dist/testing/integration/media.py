"""Collects the media of the integration run into one folder per modality."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from onellm_dist.common.errors import OneLLMError
from onellm_dist.modalities import all_modalities, get_modality
from onellm_dist.testing.integration.fetch import PackageCache, PackageUnavailableError
from onellm_dist.testing.integration.media_samples import MediaSample, list_samples

FEWEST = 2
"""Real samples of every modality that an integration run needs."""

QUESTIONS = {
    "image": "Provide a one-sentence caption for the provided image.",
    "video": "Provide a one-sentence caption for the provided video.",
    "audio": "Provide a one-sentence caption for the provided audio.",
    "point": "Provide a one-sentence caption for the provided point cloud.",
    "depth": "Provide a one-sentence caption for the provided depth map.",
    "normal": "Provide a one-sentence caption for the provided normal map.",
    "imu": "Describe the motion.",
    "fmri": "Describe the scene based on fMRI data.",
}
"""The paper's prompts (Tab. 10 and 11); where it gives none, one in the same pattern."""


def collect_media(cache: PackageCache, out: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Write the media: `<key>.<extension>` parts, `<key>.txt` and `<key>.json` of each sample.

    Every sample is decoded and transformed once, so that a file which no longer fits its modality
    is found here.

    Args:
        cache: where packages come from.
        out: folder of the media, with one folder per modality.

    Returns:
        The keys written by modality, and a line for each sample that had to be skipped.

    Raises:
        OneLLMError: a modality has fewer than FEWEST samples.
    """
    written: dict[str, list[str]] = {name: [] for name in all_modalities()}
    skipped: list[str] = []
    for sample in list_samples():
        try:
            parts = sample.make(cache)
        except PackageUnavailableError as error:
            skipped.append(f"{sample.modality} {sample.key}: {error}")
            continue
        _write_sample(out / sample.modality, sample, parts)
        written[sample.modality].append(sample.key)
    short = [f"{name} ({len(keys)})" for name, keys in written.items() if len(keys) < FEWEST]
    if short:
        lines = "\n".join(f"  {line}" for line in skipped)
        raise OneLLMError(
            f"fewer than {FEWEST} real samples of: {', '.join(short)}\n{lines}",
            "the integration run needs real media of every modality.",
            "make the packages named above reachable (pip's index; apt-get update for Debian's).",
        )
    return written, skipped


def _write_sample(folder: Path, sample: MediaSample, parts: Mapping[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for extension, data in parts.items():
        (folder / f"{sample.key}.{extension}").write_bytes(data)
    meta = {
        "caption": sample.caption,
        "conversations": [
            {"from": "human", "value": QUESTIONS[sample.modality]},
            {"from": "gpt", "value": sample.caption},
        ],
        "source": sample.source,
        "licence": sample.licence,
    }
    (folder / f"{sample.key}.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    (folder / f"{sample.key}.txt").write_text(sample.caption + "\n", encoding="utf-8")
    modality = get_modality(sample.modality)
    first = next(iter(parts))
    media = modality.read_parts(folder / f"{sample.key}.{first}")
    modality.read_value(media, meta, train=False, rng=np.random.default_rng(0))
