"""Toy brain responses (`fmri.npy`, [3, 15724] fp16): a fixed random linear code of the scene.

Every attribute value has its own random pattern over the voxels. A response is the sum of the
scene's patterns, with new noise in each of the three repetitions. Because it is a sum, a
combination that was never seen can be read too.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from onellm_dist.shards.sources.toyworld.draws import RenderedMedia
from onellm_dist.shards.sources.toyworld.point import encode_npy
from onellm_dist.shards.sources.toyworld.world import Attributes, get_scenes

REPETITIONS = 3
VOXELS = 15_724
SCALE = 2e-3
"""Root mean square of a voxel.

It is small because the tokenizer sums over 15724 voxels: at 1, an Adam step of 1e-3 would move its
outputs by about 10."""
_NOISE = 0.6
_CODE_SEED = 15_724


@cache
def make_code() -> dict[str, np.ndarray]:
    """Make the pattern [15724] fp32 of each attribute value, the same for every seed of a build."""
    rng = np.random.default_rng(_CODE_SEED)
    return {
        value: rng.normal(size=VOXELS).astype(np.float32)
        for values in get_scenes("fmri").attributes.values()
        for value in values
    }


def make_responses(attributes: Attributes, rng: np.random.Generator) -> np.ndarray:
    """Make the responses, [3, 15724] fp32."""
    patterns = (make_code()[value] for value in attributes.values())
    pattern = sum(patterns, np.zeros(VOXELS, np.float32)) / np.sqrt(len(attributes))
    noise = rng.standard_normal(size=(REPETITIONS, VOXELS), dtype=np.float32)
    return np.asarray(SCALE * (rng.uniform(0.9, 1.1) * pattern + _NOISE * noise))


def render(attributes: Attributes, rng: np.random.Generator) -> RenderedMedia:
    """Render an fMRI sample."""
    return RenderedMedia({"fmri.npy": encode_npy(make_responses(attributes, rng))})
