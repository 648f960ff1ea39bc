"""`python -m onellm_dist.testing.integration --out real_run` (`make integration`)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.logging import configure_logging
from onellm_dist.common.output import write_error
from onellm_dist.launch.local import exit_by_signal, handle_termination
from onellm_dist.testing.integration.run import run_integration


def main() -> int:
    """Parse the arguments and run; an error that a user can fix is printed in three lines."""
    parser = argparse.ArgumentParser(
        prog="python -m onellm_dist.testing.integration",
        description="Shards, align, tune and answers on real media with a real pretrained LLM.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("real_run"), help="folder of the run (default: real_run)"
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="optimizer steps of each stage (default: 3)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks (default: 2)")
    parser.add_argument(
        "--new-tokens", type=int, default=24, help="tokens of the longest answer (default: 24)"
    )
    parser.add_argument(
        "--preset",
        choices=["smollm2-135m", "toy"],
        default="smollm2-135m",
        help="toy: only try the phases, with a tiny model, in a minute or two",
    )
    given = parser.parse_args()
    configure_logging()
    handle_termination(exit_by_signal)  # so that the child processes are ended too
    try:
        return run_integration(
            given.out,
            steps=given.steps,
            ranks=given.ranks,
            new_tokens=given.new_tokens,
            preset=given.preset,
        )
    except OneLLMError as error:
        write_error(f"integration run: {error}")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
