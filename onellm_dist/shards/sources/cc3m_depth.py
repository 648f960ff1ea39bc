"""`onellm shards build cc3m-depth IN OUT`: CC3M pictures, each with its depth map (paper, Tab. 9; see map_pairs.py)."""

from onellm_dist.shards.sources.readers.map_pairs import make_map_source

SOURCE = make_map_source("depth")
