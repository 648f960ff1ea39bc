"""The toy world: shards that anyone can make in a minute and that a small model can really learn (DESIGN 5b)."""

from onellm_dist.shards.sources.toyworld.render import Sample, render

__all__ = ["Sample", "render"]
