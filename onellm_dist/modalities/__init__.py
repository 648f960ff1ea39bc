"""The modalities a model can read: one file each in this folder, and those of other packages."""

from __future__ import annotations

from onellm_dist.modalities.base import QUERY_TOKENS, SPAN_TOKENS, Modality, Part
from onellm_dist.modalities.registry import all_modalities, get_modality

__all__ = ["QUERY_TOKENS", "SPAN_TOKENS", "Modality", "Part", "all_modalities", "get_modality"]
