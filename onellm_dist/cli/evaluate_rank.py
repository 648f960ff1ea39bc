"""One rank of `onellm evaluate`, as job scripts start it: its arguments may have passed a shell.

python -m onellm_dist.cli.evaluate_rank MODEL TASK... --data DIR --out DIR
"""

from __future__ import annotations

import sys

from onellm_dist.cli import main
from onellm_dist.launch.arguments import decode_argument
from onellm_dist.train.run import drop_launcher_arguments

if __name__ == "__main__":
    main(["evaluate", *map(decode_argument, drop_launcher_arguments(sys.argv[1:]))])
