"""`python -m onellm_dist.train`: what the deepspeed launcher, torchrun and srun start."""

import sys

from onellm_dist.train.run import run_command_line

if __name__ == "__main__":
    sys.exit(run_command_line(sys.argv[1:]))
