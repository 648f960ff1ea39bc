"""Which files of a sample its modalities read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from onellm_dist.common.errors import SampleError
from onellm_dist.modalities import get_modality
from onellm_dist.shards.format.names import get_modality_parts


def select_parts(
    found: Mapping[str, Path], modalities: Sequence[str]
) -> tuple[dict[str, Path], str | None]:
    """Select the files that the modalities read.

    Args:
        found: extension to file.
        modalities: names of modalities.

    Returns:
        Extension to selected file, and what is wrong (None: nothing).
    """
    chosen: dict[str, Path] = {}
    for name in modalities:
        modality = get_modality(name)
        for role, accepted in get_modality_parts(modality).items():
            fitting = [e for e in accepted if e in found]
            if len(fitting) > 1:
                names = " and ".join(found[e].name for e in fitting)
                return chosen, f"ambiguous: {names} may each be the {role} file of {name}"
            chosen.update({e: found[e] for e in fitting})
        try:
            modality.match(set(found))
        except SampleError as error:
            return chosen, f"missing part: {error.what}"
    return chosen, None
