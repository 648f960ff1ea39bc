"""`onellm shards build cc3m-depth IN OUT`: CC3M pictures with depth maps (paper, Tab. 9).

The inputs are described in readers/map_pairs.py.
"""

from onellm_dist.shards.sources.readers.map_pairs import make_map_source

SOURCE = make_map_source("depth")
