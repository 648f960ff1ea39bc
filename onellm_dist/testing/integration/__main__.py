"""`python -m onellm_dist.testing.integration --out integration_run` (= `make rehearse-real`)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from onellm_dist.common.errors import OneLLMError
from onellm_dist.launch.local import exit_by_signal, handle_termination
from onellm_dist.testing.integration.run import run_rehearsal


def main() -> int:
    """Parse the arguments and run; errors that a user can mend are three lines."""
    parser = argparse.ArgumentParser(
        prog="python -m onellm_dist.testing.integration",
        description="The whole path on real media and a real LLM.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("integration_run"),
        help="folder of the rehearsal (default: integration_run)",
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="optimizer steps of each stage (default: 3)"
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument("--new-tokens", type=int, default=24, help="longest answer (default: 24)")
    parser.add_argument(
        "--preset",
        choices=["smollm2-135m", "toy"],
        default="smollm2-135m",
        help="toy: only tries the phases, in a minute or two",
    )
    given = parser.parse_args()
    handle_termination(exit_by_signal)  # what was started is ended too
    try:
        return run_rehearsal(
            given.out,
            steps=given.steps,
            ranks=given.ranks,
            new_tokens=given.new_tokens,
            preset=given.preset,
        )
    except OneLLMError as error:
        print(f"rehearsal: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
