"""Write a torch.distributed.checkpoint of sharded weights, as other FSDP programs do.

test_training_checkpoints.py runs it, one process per rank.
"""

from __future__ import annotations

import os
import sys

from checkpoints import onellm
from torch import distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from onellm_dist.launch.local import end_with_parent


def main() -> None:
    end_with_parent()
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements = (Shard(0), Shard(1), Replicate())
    model = {}
    for i, (name, parameter) in enumerate(onellm(seed=9).named_parameters()):
        if name.startswith(("upm.", "projectors.", "tokenizers.")):
            placement = placements[i % 3] if parameter.ndim > 1 else Shard(0)
            model[name] = distribute_tensor(parameter.detach(), mesh, [placement])
    optim = {"state": {name: {"exp_avg": weight * 7} for name, weight in model.items()}}
    save({"model": model, "optim": optim, "step": 4}, checkpoint_id=sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


if __name__ == "__main__":
    main()
