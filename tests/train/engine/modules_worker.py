"""Run by test_engine.py on a rank: what an engine of DeepSpeed has loaded of torch's compiler."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from engine_worker import new_engine, new_model

from onellm_dist.launch.local import end_with_parent
from onellm_dist.launch.ranks import discover_ranks
from onellm_dist.train.distributed import join, leave


def main() -> None:
    end_with_parent()
    ranks = discover_ranks()
    assert ranks is not None
    dist = join(ranks)
    new_engine(dist, new_model({}), {"config": "zero1"})
    loaded = {
        "inductor": "torch._inductor.compile_fx" in sys.modules,
        "muon": "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules,
        "switched off": "TORCHDYNAMO_DISABLE" in os.environ,
    }
    Path(sys.argv[1]).write_text(json.dumps(loaded))
    leave()
    os._exit(0)


if __name__ == "__main__":
    main()
