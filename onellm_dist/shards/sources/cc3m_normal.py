"""`onellm shards build cc3m-normal IN OUT`: CC3M pictures, each with its normal map (paper, Tab. 9; see map_pairs.py)."""

from onellm_dist.shards.sources.readers.map_pairs import make_map_source

SOURCE = make_map_source("normal")
