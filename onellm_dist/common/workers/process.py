"""A worker: a forked process that reads samples until its parent process ends it."""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Hashable
from typing import Any, NoReturn, Protocol, TypeVar

import torch

from onellm_dist.common.errors import OneLLMError
from onellm_dist.common.patient_stream import drop_unread_output
from onellm_dist.common.processes import kill_with_parent
from onellm_dist.common.workers.allocator import keep_freed_memory
from onellm_dist.common.workers.handover import receive, send
from onellm_dist.common.workers.sandbox import HANDING_OVER, OutOfMemoryError, Sandbox
from onellm_dist.common.workers.words import PoolWords, make_memory_error

IGNORED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that a cluster sends to every process of a job. The parent process decides what they
mean; its workers keep reading."""
OUT_OF_MEMORY = 101
"""Exit code of a worker in which a sample needed more memory than it may."""
CANNOT_HAND_OVER = 102
"""Exit code of a worker that can pass neither its result nor an error to its parent process."""
_FORK_LOCK = threading.Lock()
Task_contra = TypeVar("Task_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)


class SampleReader(Protocol[Task_contra, Result_co]):
    """What a worker reads with; each worker has a copy of that of the parent process."""

    sandbox: Sandbox

    def read(self, task: Task_contra) -> Result_co:
        """Read the samples of a task, each within `sandbox.sample`."""

    def get_sample_id(self, task: Task_contra, index: int) -> Hashable:
        """Return what names a sample of a task, and no other sample; its text is for messages."""

    def skip(self, sample_id: Any, reason: str) -> None:
        """Leave out a sample from now on; called in the parent process."""


def fork_worker(
    reader: SampleReader[Any, Any],
    sandbox: Sandbox,
    connection: socket.socket,
    words: PoolWords,
    close: Callable[[], None],
) -> int:
    """Start a worker.

    Args:
        reader: what it reads with.
        sandbox: its limits.
        connection: its end of a pair of sockets.
        words: what it is called.
        close: closes, in the worker, what belongs to the parent process alone.

    Returns:
        Its process id.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = _fork()
    if pid:
        return pid
    code = 1
    try:
        _prepare_process(parent)
        close()
        reader.sandbox = sandbox
        _Server(reader, sandbox, connection, words).serve()
        code = 0
    except OutOfMemoryError:
        code = OUT_OF_MEMORY
    except (BrokenPipeError, ConnectionResetError):  # the parent has ended
        code = 0
    except OSError:
        code = CANNOT_HAND_OVER
        traceback.print_exc()
    except BaseException:
        traceback.print_exc()
    finally:
        _exit(code)


def _fork() -> int:
    """Fork; the child never collects the garbage of its parent.

    Some of it waits for its threads when it is freed (the scaler of PyAV 15 and newer), and threads
    do not survive a fork.
    """
    with _FORK_LOCK:  # released in the child, too
        was_enabled = gc.isenabled()
        gc.disable()  # what runs after a fork allocates, and could start a collection in the child
        pid = -1
        try:
            pid = os.fork()
        finally:
            if pid == 0:
                gc.freeze()
            if was_enabled:
                gc.enable()
    return pid


def _prepare_process(parent: int) -> None:
    kill_with_parent(parent)
    signal.set_wakeup_fd(-1)
    for number in IGNORED_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # A crash of a decoder is expected and reported: it leaves no core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    keep_freed_memory()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    drop_unread_output()  # a worker that waits for a reader would seem to hang over its sample
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


class _Server:
    """Answers the requests of the parent process, in the worker."""

    def __init__(
        self,
        reader: SampleReader[Any, Any],
        sandbox: Sandbox,
        connection: socket.socket,
        words: PoolWords,
    ) -> None:
        self._reader = reader
        self._sandbox = sandbox
        self._connection = connection
        self._words = words

    def serve(self) -> None:
        """Read what is asked for until the parent process closes the connection."""
        number = 0
        while True:
            try:
                number, task = receive(self._connection)
            except (EOFError, ConnectionResetError):  # reset: it had not read the last result
                return
            self._sandbox.begin(number)
            found = self._read(task)
            self._sandbox.enter(HANDING_OVER)
            try:
                send(self._connection, (number, found))
            except (BrokenPipeError, ConnectionResetError):
                return
            except (OSError, MemoryError) as error:
                # That takes next to no memory; if not even that is possible, the process ends.
                detail = f"{type(error).__name__}: {error}"
                send(self._connection, (number, make_memory_error(self._words, detail)))
            except Exception:  # a value that cannot be pickled
                send(self._connection, (number, self._make_program_error()))
            del found, task
            self._sandbox.begin(number)

    def _read(self, task: Any) -> Any:
        """Read a task; an error is returned, so that it arrives as what it is."""
        try:
            return self._reader.read(task)
        except OutOfMemoryError as error:
            if self._sandbox.is_limited:
                raise
            return error
        except OneLLMError as error:
            return error
        except MemoryError as error:
            return make_memory_error(self._words, str(error))
        except Exception:
            return self._make_program_error()

    def _make_program_error(self) -> RuntimeError:
        return RuntimeError(f"in a {self._words.worker}:\n{traceback.format_exc()}")


def _exit(code: int) -> NoReturn:
    """End without Python's clean-up, which belongs to the parent process."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except Exception:  # a closed pipe: nobody reads it
        pass
    os._exit(code)
