"""What image, video, depth and normal share: the file types, and CLIP's normalisation."""

from __future__ import annotations

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
SIDE = 224
"""Pixels a side of the encoder's input; it has no other size (its positions are not interpolated)."""
PATCHES = (SIDE // 14) ** 2
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
