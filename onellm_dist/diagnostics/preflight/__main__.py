"""A local rank of `onellm doctor --distributed`.

Under a launcher, start `onellm_dist.cli doctor --distributed` instead.
"""

import sys

from onellm_dist.diagnostics.preflight.run import parse_options, run_preflight

if __name__ == "__main__":
    sys.exit(run_preflight(parse_options(sys.argv[1])))
