"""The `onellm` command.

It only wires: each command imports its room when it is called, so that `--help` is instant.
"""

from __future__ import annotations

import io
import os
import sys
from typing import NoReturn

import typer

from onellm_dist.cli import ablate, cluster, convert, evaluate, evaluate_run, plan, runs, shards
from onellm_dist.cli.chat import chat
from onellm_dist.cli.generate import add_modality_options, generate
from onellm_dist.cli.overlap import overlap
from onellm_dist.cli.serve import serve
from onellm_dist.common.errors import EXIT_DONE, OneLLMError
from onellm_dist.common.logging import configure_logging

app = typer.Typer(name="onellm", no_args_is_help=True, pretty_exceptions_enable=False)

for _commands in (runs, cluster, plan, evaluate, evaluate_run, ablate):
    app.add_typer(_commands.app)
shards.app.command("overlap")(overlap)
app.add_typer(shards.app, name="shards")
app.add_typer(convert.app, name="convert")
app.command("generate")(generate)
app.command("chat")(chat)
app.command("serve")(serve)
COMPLETION_VARIABLE = "_ONELLM_COMPLETE"
"""Set by the shell that wants a command line completed (click)."""


@app.callback()
def prepare() -> None:
    """Train, feed and study multimodal LLMs: eight modalities, tar shards, exact resumes."""
    configure_logging()


def main(argv: list[str] | None = None) -> NoReturn:
    """Run the `onellm` command.

    An error that a user can fix is printed in three lines, without a traceback.

    Args:
        argv: the arguments; default: those of the process.
    """
    arguments = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        # A locale such as ISO-8859-1 has no character for much of what a model may answer.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Importing the modalities takes seconds, which other commands do not spend.
    if arguments[:1] == ["generate"] or COMPLETION_VARIABLE in os.environ:
        add_modality_options()
    try:
        app(arguments, prog_name="onellm")
    except OneLLMError as error:
        print(f"onellm: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(EXIT_DONE)
