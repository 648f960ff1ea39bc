"""What commands write: byte by byte, and at once where somebody waits."""

from __future__ import annotations

import subprocess
import sys

import pytest

from onellm_dist.common.output import write_error, write_output


def test_lines_go_to_their_streams(capsys: pytest.CaptureFixture[str]) -> None:
    write_output("one", "two", flush=True)
    write_output()
    write_error("no", end="")
    assert capsys.readouterr() == ("one\ntwo\n\n", "no")


def test_flushed_output_is_there_before_the_process_ends() -> None:
    code = "import sys; from onellm_dist.common.output import write_output as write; "
    code += "write('ready', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
