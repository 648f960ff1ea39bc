"""How the spans of a sample are shared among its media."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from onellm_dist.common.media_size import MediaSize
from onellm_dist.modalities.base import Modality


def share_spans(
    media: Sequence[tuple[str, MediaSize]],
    most: Mapping[str, int],
    modalities: Mapping[str, Modality],
) -> list[int]:
    """Say how many spans each medium of a sample takes, at least one.

    The media of one modality share its spans equally, rounded down, so that many pictures are not
    cut into tiles (as in InternVL; LLaVA-NeXT cuts none where there are several).

    Args:
        media: modality and size of each.
        most: modality to the most spans of all its media in a sample; default: one each.
        modalities: the modalities by name.
    """
    counts = Counter(name for name, _ in media)
    found = []
    for name, size in media:
        share = most.get(name, 1) // counts[name]
        found.append(modalities[name].count_spans(size, share) if share > 1 else 1)
    return found
