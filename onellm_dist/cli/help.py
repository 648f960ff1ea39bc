"""Examples at the end of a command's `--help`."""

from __future__ import annotations


def format_examples(*commands: str) -> str:
    """Format the epilog of a command: one example per line.

    Args:
        commands: complete command lines.
    """
    # Typer joins the lines of a paragraph, so each example is a paragraph of its own.
    title = "Example:" if len(commands) == 1 else "Examples:"
    return "\n\n".join([title, *commands])
