"""Workers as the process sees them that starts them: what it sends, what comes back, and how they ended.

Guarantees: a worker's exception arrives as `WorkerFailed` with the worker's traceback; its death, whatever the cause,
as `WorkerLost`, which says how it ended and what it was doing; neither is waited for. `end` leaves no process behind.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any, NamedTuple

from bagel_ds.errors import UserError
from bagel_ds.processes.server import END, SHARE, SHOW_STACKS, START, STOP_SIGNALS

logger = logging.getLogger("bagel_ds")

_PRELOAD = ("bagel_ds.data.batches.loader", "bagel_ds.data.inspect.check")
# No thread in the server: of OpenMP, of numpy's BLAS, of `tokenizers`, of the allocator that comes with Arrow.
_NO_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_NO_THREADS |= {"TOKENIZERS_PARALLELISM": "false", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
# Freed blocks go back to the system, as in ranks (`train/process/allocators.py`): pictures are large and short-lived.
_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**22), "MALLOC_ARENA_MAX": "2"}
_NO_PROCESS = "no process can be started: {}. Limits are the number of processes (`ulimit -u`) and memory."
_OUT_OF_MEMORY = " (the kernel does so where memory runs out, and `dmesg` tells it; fewer workers need less)"
_DYING_SECONDS = 5.0  # between a worker's closing its socket and its end


class WorkerFailed(RuntimeError):
    """A worker's function raised what is no `UserError`; the message holds its traceback."""


class WorkerLost(UserError):
    """A worker has ended before its work was done."""


class _Failure(NamedTuple):
    """What a worker sends instead of a result."""

    text: str
    is_user_error: bool


def answer_tasks(
    connection: Connection, work: Callable[[Any], Any], send: Callable[[Connection, Any], None] = Connection.send
) -> None:
    """In a worker: send back `work(task)` for each task that comes, until the other side closes the connection."""
    with suppress(EOFError, ConnectionError):  # nobody is left to work for
        while True:
            task = connection.recv()
            try:
                send(connection, work(task))
            except UserError as error:
                connection.send(_Failure(str(error), True))
            except Exception:  # of the work, or of sending what came of it
                connection.send(_Failure(traceback.format_exc(), False))


class Worker:
    """A process that `start_worker` has started. `doing` says what it was asked for, as in "it read a.parquet"."""

    def __init__(self, server: _Server, pid: int, connection: Connection, name: str) -> None:
        self.pid, self.connection, self.name = pid, connection, f"{name} (process {pid})"
        self.doing: Callable[[], str] = lambda: "it had nothing to do"
        self._server, self._ending = server, threading.Lock()
        self._code: int | None = None  # known once it has ended

    def send(self, value: Any) -> None:
        """Where the worker is gone this does nothing: `receive` says so."""
        with suppress(OSError):
            self.connection.send(value)

    def receive(self, receive: Callable[[Connection], Any] = Connection.recv) -> Any:
        """What it sends next. Raises `WorkerFailed`, `WorkerLost`, or the `UserError` that it met."""
        try:
            found = receive(self.connection)
        except (EOFError, OSError):
            raise WorkerLost(f"{self.name} {self._how_it_ended()} while {self.doing()}.") from None
        if isinstance(found, _Failure):
            if found.is_user_error:
                raise UserError(found.text)
            raise WorkerFailed(f"{self.name} failed while {self.doing()}:\n{found.text}")
        return found

    def ended(self, patience: float = 0.0) -> int | None:
        """Its exit code, -9 where SIGKILL ended it, when it has ended; else it is killed after so many seconds."""
        with self._ending:
            if self._code is None:
                self._code = self._server.end(self.pid, patience)
            return self._code

    def end(self) -> None:
        """Kill it: it holds nothing that could be left unfinished."""
        self.ended()
        self.connection.close()

    def _how_it_ended(self) -> str:
        code = self.ended(_DYING_SECONDS)
        if code is None:
            return "does not answer, and can't be killed,"
        if code >= 0:
            return f"ended with code {code}"
        why = _OUT_OF_MEMORY if code == -signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{why}"


class _Server:
    """The server of this process, which may be asked from any of its threads."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.workers: dict[int, Worker] = {}
        self._asking = threading.Lock()
        self._shared: Any = None
        self._is_ready = False
        ours, theirs = socket.socketpair()
        words = [sys.executable, "-P", "-m", "bagel_ds.processes", str(theirs.fileno()), str(self.owner)]
        with ours, theirs, _stop_signals_blocked():
            # Fork and exec in one go, which runs no Python in between: safe with any threads.
            try:
                self._process = subprocess.Popen(
                    words, pass_fds=[theirs.fileno()], env=_environment(), stdin=subprocess.DEVNULL
                )
            except OSError as error:
                raise UserError(_NO_PROCESS.format(error.strerror)) from None
            self._control = Connection(ours.detach())
        with suppress(OSError):  # where it has ended already the first question says so
            self._control.send((sys.path, _PRELOAD))

    def start(self, function: Callable[..., None], arguments: tuple[Any, ...], shared: Any, name: str) -> Worker:
        ours, theirs = socket.socketpair()
        connection = Connection(ours.detach())
        with theirs, self._asking:
            if shared is not self._shared:
                self._ask(SHARE, shared)
                self._shared = shared
            pid = self._ask(START, descriptor=theirs.fileno())
            if isinstance(pid, str):
                connection.close()
                raise UserError(_NO_PROCESS.format(pid))
            worker = self.workers[pid] = Worker(self, pid, connection, name)
        worker.send((sys.path, _working_folder(), dict(os.environ) | _NO_THREADS))
        worker.send((function, arguments))
        return worker

    def end(self, pid: int, patience: float) -> int | None:
        """See `Worker.ended`. Where the server is gone the kernel has killed its workers."""
        with self._asking:
            self.workers.pop(pid, None)
            try:
                return int(code) if (code := self._ask(END, pid, patience)) is not None else None
            except WorkerLost:
                return -signal.SIGKILL

    def is_usable(self) -> bool:
        return self.owner == os.getpid() and self._process.poll() is None

    def close(self) -> None:
        """End the server and all workers."""
        self._process.kill()
        self._process.wait()
        self._control.close()

    def _ask(self, request: str, *details: Any, descriptor: int | None = None) -> Any:
        try:
            if not self._is_ready:
                self._tell_threads(self._control.recv())
                self._is_ready = True
            self._control.send((request, *details))
            if descriptor is not None:
                send_handle(self._control, descriptor, self._process.pid)
            return self._control.recv()
        except (EOFError, OSError):
            code = self._process.wait()
            raise WorkerLost(
                f"the process that data workers are started from (process {self._process.pid}) ended with code {code}; "
                "what it printed is above"
            ) from None
        except BaseException:  # interrupted: the next question would get the answer to this one
            self.close()
            raise

    def _tell_threads(self, names: list[str]) -> None:
        if names:
            logger.warning(
                "the process that data workers are forked from has threads of libraries it imports (%s). A worker may "
                "hang at its start; if one does, please report these names",
                ", ".join(names),
            )


_server: _Server | None = None
_choosing = threading.Lock()


def start_server() -> None:
    """Start the server now, so that its imports are done by the time the first worker is wanted; doesn't wait."""
    _running()


def start_worker(function: Callable[..., None], *arguments: Any, name: str, shared: Any = None) -> Worker:
    """A process that runs `function(connection, shared, *arguments)`, with this one's environment and folder.

    All of them are sent by pickle; `shared` only once for all workers that follow one another with the same object, and
    they share its memory. `name` is for messages, as in "data worker 0". Raises `UserError`.
    """
    return _running().start(function, arguments, shared, name)


def show_stacks() -> list[str]:
    """Have every worker of this process print its stacks to stderr; which they are, and what they do."""
    found = list(_server.workers.values()) if _server is not None and _server.is_usable() else []
    for worker in found:
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGCONT)
            os.kill(worker.pid, SHOW_STACKS)
    return [f"{worker.name}: {worker.doing()}" for worker in found]


def _running() -> _Server:
    global _server
    with _choosing:
        if _server is None or not _server.is_usable():
            _server = _Server()
        return _server


@atexit.register
def _close() -> None:
    if _server is not None and _server.owner == os.getpid():
        _server.close()


@contextmanager
def _stop_signals_blocked() -> Iterator[None]:
    """A process inherits the mask: a signal to the group can't end it before it ignores them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment() -> dict[str, str]:
    package = str(Path(__file__).resolve().parents[2])
    python_path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return {**_MEMORY, **os.environ, **_NO_THREADS, "PYTHONPATH": python_path}


def _working_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None
