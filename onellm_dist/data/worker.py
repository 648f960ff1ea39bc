"""A loader worker: a forked process that reads micro-batches until the training process ends it."""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NamedTuple, NoReturn, Protocol

import torch

from onellm_dist.common.errors import MachineError, OneLLMError
from onellm_dist.common.patient_stream import drop_unread_output
from onellm_dist.common.processes import kill_with_parent
from onellm_dist.data.handover import receive, send
from onellm_dist.data.micro_batch import MicroBatch
from onellm_dist.data.sandbox import HANDING_OVER, OutOfMemoryError, Sandbox
from onellm_dist.packed import PackedBatch

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a cluster sends to every process of a job. The training process decides what they
mean; its workers keep reading."""
OUT_OF_MEMORY = 101
"""Exit code of a worker in which a sample needed more memory than it may."""
CANNOT_HAND_OVER = 102
"""Exit code of a worker that can pass neither its batch nor an error to the training process."""


class LoaderTask(NamedTuple):
    """What a worker is asked for: a micro-batch, and the one it will be asked for next."""

    micro: MicroBatch
    ahead: MicroBatch | None


class BatchReader(Protocol):
    """What a worker reads with (`onellm_dist.data.reader.Reader`)."""

    sandbox: Sandbox

    def read(self, micro: MicroBatch, ahead: MicroBatch | None = None) -> PackedBatch:
        """Read a micro-batch."""

    def get_sample_id(self, micro: MicroBatch, index: int) -> str:
        """Id of a sample of a micro-batch."""

    def skip(self, sample_id: str, reason: str) -> None:
        """Read a sample as a skipped one from now on."""


def fork_worker(
    reader: BatchReader, sandbox: Sandbox, connection: socket.socket, close: Callable[[], None]
) -> int:
    """Start a worker.

    Args:
        reader: what it reads with.
        sandbox: its limits.
        connection: its end of a pair of sockets.
        close: closes, in the worker, what belongs to the training process alone.

    Returns:
        Its process id.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _prepare_process(parent)
        close()
        reader.sandbox = sandbox
        _serve(reader, sandbox, connection)
        code = 0
    except OutOfMemoryError:
        code = OUT_OF_MEMORY
    except (BrokenPipeError, ConnectionResetError):  # the training process has ended
        code = 0
    except OSError:
        code = CANNOT_HAND_OVER
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        _exit(code)


def _prepare_process(parent: int) -> None:
    kill_with_parent(parent)
    signal.set_wakeup_fd(-1)
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # A crash of a decoder is expected and reported: it leaves no core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    drop_unread_output()  # a worker that waits for a reader would seem to hang over its sample
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _serve(reader: BatchReader, sandbox: Sandbox, connection: socket.socket) -> None:
    number = 0
    while True:
        try:
            number, task = receive(connection)
        except (EOFError, ConnectionResetError):  # reset: it had not read the last batch
            return
        sandbox.begin(number)
        found = _read(reader, task, sandbox)
        sandbox.enter(HANDING_OVER)
        try:
            send(connection, (number, found))
        except (BrokenPipeError, ConnectionResetError):
            return
        except (OSError, MemoryError) as error:
            _report(connection, number, error)
        except Exception:  # a value that cannot be pickled
            send(connection, (number, _make_program_error()))
        del found, task
        sandbox.begin(number)


def _read(reader: BatchReader, task: LoaderTask, sandbox: Sandbox) -> PackedBatch | Exception:
    """Read a micro-batch; an error is returned, so that it arrives as what it is."""
    try:
        return reader.read(*task)
    except OutOfMemoryError as error:
        if sandbox.is_limited:
            raise
        return error
    except OneLLMError as error:
        return error
    except MemoryError as error:
        return make_memory_error(str(error))
    except Exception:
        return _make_program_error()


def _make_program_error() -> RuntimeError:
    return RuntimeError(f"in a loader worker:\n{traceback.format_exc()}")


def _report(connection: socket.socket, number: int, error: Exception) -> None:
    """Say that a batch cannot be handed over; that takes next to no memory.

    Raises:
        OSError: not even that is possible.
    """
    send(connection, (number, make_memory_error(f"{type(error).__name__}: {error}")))


def make_memory_error(detail: str) -> MachineError:
    """The error of a worker that has no memory for its batch, or no file descriptor."""
    return MachineError(
        f"a loader worker cannot hand its batch to the training process: {detail}",
        "the machine or its container has no memory, or this user no file descriptor, left for it; "
        "no sample is at fault.",
        "use fewer loader processes (data.workers) or fewer batches ahead (data.prefetch), give "
        "the job more memory, or raise `ulimit -n`.",
    )


def _exit(code: int) -> NoReturn:
    """End without Python's clean-up, which belongs to the training process."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:  # a closed pipe: nobody reads it
        pass
    os._exit(code)
