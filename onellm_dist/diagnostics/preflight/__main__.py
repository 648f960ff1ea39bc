"""A local rank of `onellm doctor --distributed`; under a launcher, start `onellm_dist.cli doctor --distributed` instead."""

import sys

from onellm_dist.diagnostics.preflight.run import options_from, run_preflight

if __name__ == "__main__":
    sys.exit(run_preflight(options_from(sys.argv[1])))
