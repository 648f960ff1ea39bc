"""`onellm doctor`: what this machine has, and what would break or slow a training run on it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from onellm_dist.common.errors import EXIT_DONE, EXIT_FAILED
from onellm_dist.common.output import write_output
from onellm_dist.diagnostics.check_result import CheckResult
from onellm_dist.diagnostics.machine_checks import (
    check_devices,
    check_disk,
    check_host,
    check_shared_memory,
)
from onellm_dist.diagnostics.software_checks import (
    check_attention,
    check_float8,
    check_imports,
    check_kernels,
    check_launchers,
    check_packages,
    check_torchaudio,
)

COLOURS = {"ok": "green", "note": "dim", "warn": "yellow", "fail": "bold red"}


def run_doctor() -> int:
    """Run all checks and print their results.

    Returns:
        0, or 1 if something would break training.
    """
    results = list(run_checks())
    print_results(results)
    failures = sum(result.state == "fail" for result in results)
    warnings = sum(result.state == "warn" for result in results)
    if failures or warnings:
        write_output(
            f"{_count(failures, 'problem')} that would break training, "
            f"{_count(warnings, 'warning')}."
        )
    else:
        write_output("This machine is ready to train.")
    return EXIT_FAILED if failures else EXIT_DONE


def run_checks() -> Iterator[CheckResult]:
    """All checks, in the order of the report."""
    yield from check_packages()
    yield from check_torchaudio()
    yield from check_imports()
    yield from check_devices()
    yield check_attention()
    yield check_kernels()
    yield check_float8()
    yield from check_launchers()
    yield from check_host()
    yield check_shared_memory(Path("/dev/shm"))
    yield check_disk(Path.cwd())


def print_results(results: Iterable[CheckResult]) -> None:
    """Print a table on a terminal, and plain lines elsewhere.

    A plain line is `[state] part: name: detail`, with the remedy on a line below it.
    """
    if not sys.stdout.isatty():
        for result in results:
            write_output(f"[{result.state:4}] {result.part}: {result.name}: {result.detail}")
            if result.remedy:
                write_output(f"       -> {result.remedy}")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("", "part", "what", "result"):
        table.add_column(heading)
    for result in results:
        remedy = f"\n-> {result.remedy}" if result.remedy else ""
        state = f"[{COLOURS[result.state]}]{result.state}[/]"
        table.add_row(state, result.part, result.name, result.detail + remedy)
    Console().print(table)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
