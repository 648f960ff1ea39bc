"""Output that nobody reads, and calls that never end, stop nobody."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from onellm_dist.common.background import BackgroundCalls

PRINTS = """
import logging, sys, time
from onellm_dist.common import patient_stream
from onellm_dist.common.logging import configure_logging, get_logger
patient_stream.DRAIN_S = 0.3
patient_stream.replace_output()
configure_logging()
log = get_logger("onellm_dist.x")
started = time.monotonic()
for i in range(20000):
    log.info("line %d %s", i, "x" * 40)
    print("by print", i, file=sys.stderr)
took = time.monotonic() - started
with open(sys.argv[1], "w") as out:
    out.write(f"{took}")
for stream in (sys.stdout, sys.stderr):
    stream.drain(0.3)
import os
os._exit(7)
"""


@pytest.mark.parametrize("reader", ["sleeps", "closes", "full_disk"])
@pytest.mark.seconds
def test_a_process_whose_output_nobody_reads_goes_on_to_its_end(
    tmp_path: os.PathLike[str], reader: str
) -> None:
    done = os.path.join(tmp_path, "done")
    command = [sys.executable, "-c", PRINTS, done]
    target: int = subprocess.PIPE
    if reader == "full_disk":
        target = os.open("/dev/full", os.O_WRONLY)
    process = subprocess.Popen(command, stdout=target, stderr=target)
    if reader == "closes":
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stderr.close()
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    code = process.poll()
    process.kill()
    assert code == 7
    with open(done, encoding="utf-8") as file:
        assert float(file.read()) < 20


def test_what_is_read_arrives_complete_and_in_order() -> None:
    code = (
        "import sys; from onellm_dist.common.patient_stream import patient_output\n"
        "with patient_output():\n"
        "    for i in range(5000): print('line', i, 'ä')\n"
        "print('after')"
    )
    env = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env=env,
    )
    assert done.stdout.splitlines() == [*(f"line {i} ä" for i in range(5000)), "after"]


FORKS = """
import os, sys, time
from onellm_dist.common import patient_stream
if sys.argv[1] == "patient":
    patient_stream.replace_output()
pid = os.fork()
if pid == 0:
    code = 1
    try:
        patient_stream.drop_unread_output()
        print("first", flush=True)
        for i in range(3000):
            print("by print", "x" * 100)
            print("x" * 9000, file=sys.stderr)
            for descriptor in (1, 2):
                try:
                    os.write(descriptor, b"by C code" * 100)
                except OSError:
                    pass
        code = 7
    finally:
        os._exit(code)
_, status = os.waitpid(pid, 0)
assert os.get_blocking(1) and os.get_blocking(2)
os._exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("stream", ["patient", "plain"])
@pytest.mark.parametrize("reader", ["pipe", "terminal", "closes", "full_disk", "file"])
def test_a_forked_process_never_waits_for_a_reader(
    tmp_path: Path, reader: str, stream: str
) -> None:
    if reader == "terminal":
        ours, target = os.openpty()
        termios.tcflow(target, termios.TCOOFF)  # Ctrl-S
    elif reader == "full_disk":
        ours = target = os.open("/dev/full", os.O_WRONLY)
    elif reader == "file":
        ours = target = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    else:
        ours, target = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-Wignore", "-c", FORKS, stream],
        stdout=target,
        stderr=target,
        start_new_session=True,
    )
    if ours != target:
        os.close(target)
    if reader == "closes":
        os.close(ours)
    try:
        assert process.wait(30) == 7
        if reader == "pipe":
            assert os.read(ours, 6) == b"first\n"
        elif reader == "file":
            assert (tmp_path / "log").read_text("utf-8").count("by print") == 3000
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        if reader != "closes":
            os.close(ours)


def test_calls_are_made_in_order_and_waited_for() -> None:
    seen: list[int] = []
    calls = BackgroundCalls("t", lambda name, problem: pytest.fail(problem))
    for i in range(50):
        calls.call("add", seen.append, i)
    calls.close()
    assert seen == list(range(50)) and not calls.failed


@pytest.mark.parametrize("how", ["raises", "blocks", "blocks_at_the_end"])
def test_a_call_that_fails_or_blocks_is_the_last_and_is_logged_once(how: str) -> None:
    failures: list[tuple[str, str]] = []
    hold, seen = threading.Event(), list[int]()
    calls = BackgroundCalls("t", lambda *found: failures.append(found), patience=0.2)

    def bad() -> None:
        if how == "raises":
            raise ConnectionError("no route")
        hold.wait()

    started = time.monotonic()
    calls.call("first", seen.append, 1)
    calls.call("bad", bad)
    if how != "blocks_at_the_end":
        time.sleep(0.4)
        for i in range(5):
            calls.call("later", seen.append, i)
    calls.close()
    assert time.monotonic() - started < 5
    hold.set()
    assert seen == [1]
    ((name, problem),) = failures
    assert name == "bad" and ("no route" in problem or "no answer for 0.2 s" in problem)
